//! What a snapshot depends on beyond its own bytes: kernel, vdso and CPU features.
//!
//! Programs cache the addresses of vdso functions and choose code by CPU feature once. A snapshot
//! is therefore restored only where both are the same; the check comes before anything is touched.

use std::fmt;

/// Describes one machine, as far as snapshots depend on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint(String);

/// Why the machine could not be described.
#[derive(Debug, thiserror::Error)]
pub enum FingerprintError {
    #[error("Failed to read {path}; is /proc mounted?")]
    Read {
        path: &'static str,
        source: std::io::Error,
    },
    #[error(
        "This process has no vdso, so no snapshot can be checked against it; boot without vdso=0"
    )]
    NoVdso,
}

impl Fingerprint {
    /// Describes the machine that this runs on.
    ///
    /// # Errors
    /// When /proc cannot be read or the kernel gives no vdso.
    pub fn of_this_machine() -> Result<Self, FingerprintError> {
        let read = |path: &'static str| {
            std::fs::read_to_string(path).map_err(|source| FingerprintError::Read { path, source })
        };
        let maps = read("/proc/self/maps")?;
        let release = read("/proc/sys/kernel/osrelease")?;
        let cpu = read("/proc/cpuinfo")?;
        let mut hash = blake3::Hasher::new();
        let mut vdso = None;
        // Sizes and order of the kernel's own mappings: vvar, vvar_vclock, vdso.
        for line in maps.lines() {
            let Some((range, name)) = line
                .split_once(' ')
                .zip(line.rsplit_once(' '))
                .map(|(a, b)| (a.0, b.1))
            else {
                continue;
            };
            if !name.starts_with("[vvar") && name != "[vdso]" {
                continue;
            }
            let Some((start, end)) = range.split_once('-') else {
                continue;
            };
            let parse = |text| u64::from_str_radix(text, 16).unwrap_or(0);
            let (start, end) = (parse(start), parse(end));
            hash.update(name.as_bytes())
                .update(&(end - start).to_le_bytes());
            if name == "[vdso]" {
                vdso = Some((start, end));
            }
        }
        let Some((start, end)) = vdso else {
            return Err(FingerprintError::NoVdso);
        };
        // SAFETY: /proc/self/maps says that the vdso is mapped readable there, and it never moves.
        let code =
            unsafe { std::slice::from_raw_parts(start as *const u8, (end - start) as usize) };
        hash.update(code);
        for key in ["vendor_id", "flags"] {
            let line = cpu
                .lines()
                .find(|line| line.starts_with(key))
                .unwrap_or_default();
            hash.update(line.as_bytes());
        }
        Ok(Self(format!(
            "{}-{}",
            release.trim(),
            &hash.finalize().to_hex()[..16]
        )))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_the_same_every_time() {
        let first = Fingerprint::of_this_machine().unwrap();
        assert_eq!(first, Fingerprint::of_this_machine().unwrap());
        assert!(first.to_string().contains('-'));
    }
}
