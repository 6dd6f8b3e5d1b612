"""How it is used on a pipeline: attach a method, look at what it did, take it off."""

from gen_accel.pipelines.attach import Attachment, attach
from gen_accel.pipelines.schedule import Schedule
from gen_accel.pipelines.summary import Summary

__all__ = ["Attachment", "Schedule", "Summary", "attach"]
