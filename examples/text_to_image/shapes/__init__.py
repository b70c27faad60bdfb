"""The embedded default: a data set of captioned shapes, a teacher made from it, and a classifier of its images."""
