"""What both stages share: settings, learners, the loop that resumes, and the folder of a run."""
