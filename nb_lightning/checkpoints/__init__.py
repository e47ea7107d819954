"""Models on disk: run folders, Hugging Face folders, GGUF files, and the tokenizers beside them."""
