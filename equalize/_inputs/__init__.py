"""What users give: arguments and configs, checked before anything is done with them."""
