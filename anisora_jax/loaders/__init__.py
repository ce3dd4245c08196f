"""Records of clips and the Grain pipeline that turns them into batches."""
