"""What the model may see: masks over pixels and the conditions made from them."""
