"""What the paper compares itself with, to its authors' definitions."""
