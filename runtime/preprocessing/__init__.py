"""One file a kind of image preprocessing, found by its name: pixels for the encoder, tokens for the prompt."""
