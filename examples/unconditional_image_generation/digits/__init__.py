"""The embedded default: a teacher of handwritten digits, a classifier of its images, and what real digits are like."""
