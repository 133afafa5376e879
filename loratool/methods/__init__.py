"""Methods of combining, one annotated function a file; the signature is the schema of its options."""
