"""The parts of `schedules.torch_scheduler.ScheduleBinder`."""
