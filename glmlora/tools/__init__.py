"""What stands beside the workflow: plan, doctor, self-test, demo, project."""
