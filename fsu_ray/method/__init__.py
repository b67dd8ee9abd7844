"""The paper in plain PyTorch: it runs on a laptop and knows nothing of Ray, SQL or storage."""
