"""What came after DeepSeek-V4: parts exchanged, and the machinery around them"""
