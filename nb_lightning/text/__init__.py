"""Text and tokens: tokenizer, messages, chat templates (rendered in a process of their own), and what is trained on."""
