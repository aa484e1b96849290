"""The Hugging Face Hub: uploads in one commit, its errors in one line each, and cards that are ours to rewrite."""
