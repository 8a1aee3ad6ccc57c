"""What the class-incremental methods on a frozen ViT share."""
