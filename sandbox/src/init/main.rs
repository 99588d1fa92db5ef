//! pid 1
fn main() {}
