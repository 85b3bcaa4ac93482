"""What pytest must not take for tests: the stand-in has AITER's names."""

collect_ignore = ["standin"]
