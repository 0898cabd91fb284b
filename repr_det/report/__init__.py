"""What runs looked like and what they showed."""
