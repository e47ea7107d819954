"""What a model is worth: accuracy on tasks, perplexity of text. Training does not import it."""
