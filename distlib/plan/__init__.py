"""What a run is, as data: `Plan`, the mesh of ranks that follows from it, and the bytes that it should take."""

from distlib.plan.expected import Expected
from distlib.plan.mesh import Mesh, Place
from distlib.plan.plan import Activations, Plan, Precision

__all__ = ["Activations", "Expected", "Mesh", "Place", "Plan", "Precision"]
