"""How one step becomes many processes."""
