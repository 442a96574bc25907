"""One colour for each way in every picture: Okabe and Ito's palette, which colour-blind people can tell apart."""

OF = {
    "untied": "#000000",
    "untied_again": "#999999",
    "reference": "#56B4E9",
    "hard": "#D55E00",
    "mean_l2": "#0072B2",
    "pairwise_l2": "#009E73",
    "chain_l2": "#009E73",
    "pairwise_norm": "#009E73",
    "pairwise_l1": "#009E73",
    "trace_norm": "#009E73",
    "stack": "#CC79A7",
    "callback": "#CC79A7",
    "all_pairs": "#CC79A7",
}
