"""What is moved: checkpoint to blocks, formats, expert compute, the plug-in for transformers."""
