"""What a run measures, sent on to other trackers: a process for each, which follows the journals at its own pace."""
