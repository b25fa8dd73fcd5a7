"""The fused engine. Use: `net = fused.attach(net)`; its maths stand in engine.py."""

from fused.common import Shape, Unsupported
from fused.engine import GraphedStep, attach, detach, why_not

__all__ = ["GraphedStep", "Shape", "Unsupported", "attach", "detach", "why_not"]
