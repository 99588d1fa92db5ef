//! masquerade
