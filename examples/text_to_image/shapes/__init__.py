"""The embedded default: a world of captioned shapes, a teacher made from it, and a judge of its images."""
