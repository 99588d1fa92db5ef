//! Durable notes of what a sandbox is made of.
