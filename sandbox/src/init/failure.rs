//! Failures as sentences: they cross a socket to the library, which puts the sandbox's id in front.

use std::{fmt, io};

/// What was being done and why it did not work.
#[derive(Debug)]
pub struct Failure(pub String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Adds what was being done to an error.
pub trait Doing<T> {
    fn doing(self, what: &str) -> Result<T, Failure>;
    fn doing_on(self, what: &str, object: &str) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: &str) -> Result<T, Failure> {
        self.map_err(|error| Failure(format!("{what}: {}", error.into())))
    }

    fn doing_on(self, what: &str, object: &str) -> Result<T, Failure> {
        self.map_err(|error| Failure(format!("{what} {object}: {}", error.into())))
    }
}

/// Checks the result of a libc call.
pub fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
