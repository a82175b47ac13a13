"""Records -> prompts: chat messages with image slots, in any format that rows bring."""
