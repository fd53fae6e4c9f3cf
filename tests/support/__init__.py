"""What several tests share: folders for the converter, jobs for ranks, where real data lies."""
