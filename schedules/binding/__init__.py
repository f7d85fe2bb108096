"""Implementation of `schedules.torch_scheduler.ScheduleBinder`."""
