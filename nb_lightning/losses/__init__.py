"""Every loss, over one chunked head that never holds [tokens, vocabulary]."""
