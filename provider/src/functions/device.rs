//! Whether instances can attach their memory from the pool's device on this machine.

use std::path::Path;

use super::StartMethod;

const DRIVER: &str = "/dev/pseudo_mm";

/// Looks whether the pool is on a device, and whether the driver is there that maps it.
///
/// # Errors
/// A sentence that says why a function cannot start by `method`, and what to do.
pub fn check(method: StartMethod, pool_on_device: bool) -> Result<(), String> {
    check_with(method, pool_on_device, Path::new(DRIVER))
}

fn check_with(method: StartMethod, pool_on_device: bool, driver: &Path) -> Result<(), String> {
    let reason = if !pool_on_device {
        "the pool is not on a device-dax; make one as docs/dax.md says, or use template".to_owned()
    } else if !driver.exists() {
        format!(
            "the driver {} is not there; load the module pseudo_mm and start trenv again, or use template",
            driver.display()
        )
    } else {
        return Ok(());
    };
    let method = method.name();
    Err(format!(
        "The start method {method} cannot be used on this machine: {reason}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pool_and_driver_are_needed() {
        let check = |pool, driver| check_with(StartMethod::Attach, pool, Path::new(driver));
        assert_eq!(check(true, "/dev/null"), Ok(()));
        let refused = check(false, "/dev/null").unwrap_err();
        assert!(
            refused.contains("attach") && refused.contains("docs/dax.md"),
            "{refused}"
        );
        let refused = check(true, "/dev/no-such-driver").unwrap_err();
        assert!(refused.contains("load the module"), "{refused}");
    }
}
