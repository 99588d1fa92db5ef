//! The position-independent code that a restored process runs before it becomes itself.
#![no_std]
