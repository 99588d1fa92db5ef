//! The snapshot engine's side of the shim.
