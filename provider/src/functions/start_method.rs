//! How a function's instances come by their memory.
//!
//! The methods are the shim's (`VersionResponse.start_methods`); their names stand here as well, so
//! that a deployment can be checked while no shim runs. All of them start from the same template,
//! so the method is no part of its key, and an update may change it without a build.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// The annotation that names a function's start method.
pub const START_METHOD_ANNOTATION: &str = "dev.trenv.start-method";

/// A start method; `docs/start-methods.md` describes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StartMethod {
    #[default]
    Template,
    Copy,
    Lazy,
    Reap,
    Faasnap,
    Spice,
    /// `copy` of the base's memory; the function is loaded by each start.
    CopyBase,
    /// Each instance attaches the pool's device when it starts.
    Attach,
    /// CRIU restores the tree.
    Criu,
    /// The same, and CRIU's page server brings pages when they are touched.
    CriuLazy,
}

impl StartMethod {
    const ALL: [Self; 10] = [
        Self::Template,
        Self::Copy,
        Self::Lazy,
        Self::Reap,
        Self::Faasnap,
        Self::Spice,
        Self::CopyBase,
        Self::Attach,
        Self::Criu,
        Self::CriuLazy,
    ];

    /// Its name, for people and for the shim.
    pub fn name(self) -> &'static str {
        match self {
            Self::Template => "template",
            Self::Copy => "copy",
            Self::Lazy => "lazy",
            Self::Reap => "reap",
            Self::Faasnap => "faasnap",
            Self::Spice => "spice",
            Self::CopyBase => "copy-base",
            Self::Attach => "attach",
            Self::Criu => "criu",
            Self::CriuLazy => "criu-lazy",
        }
    }

    /// The method of this name.
    ///
    /// # Errors
    /// A sentence that lists the names there are.
    pub fn parse(name: &str) -> Result<Self, String> {
        if name == "criu-mmap" {
            return Err(format!(
                "The annotation {START_METHOD_ANNOTATION} is {name:?}, but CRIU reads pages or serves them by faults and cannot map them; set it to criu or criu-lazy"
            ));
        }
        let found = Self::ALL.into_iter().find(|method| method.name() == name);
        found.ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.into_iter().map(Self::name).collect();
            format!(
                "The annotation {START_METHOD_ANNOTATION} is {name:?}, which is no start method; set it to one of {}",
                names.join(", ")
            )
        })
    }

    /// Whether its starts need an image that CRIU has written.
    pub fn by_criu(self) -> bool {
        matches!(self, Self::Criu | Self::CriuLazy)
    }

    /// Whether its instances can be restored ahead and stopped before their first instruction.
    pub fn parks(self) -> bool {
        self == Self::Template
    }
}

/// The method that a revision uses now, and for which methods its template was made ready.
#[derive(Debug, Default)]
pub struct Methods {
    now: AtomicU8,
    /// For each method the shim connection over which the template was last made ready for it; 0
    /// before the first.
    prepared: [AtomicU64; StartMethod::ALL.len()],
}

impl Methods {
    /// The method that starts use now.
    pub fn now(&self) -> StartMethod {
        let index = usize::from(self.now.load(Ordering::Acquire));
        StartMethod::ALL.get(index).copied().unwrap_or_default()
    }

    /// Changes the method; the one before.
    pub fn set(&self, method: StartMethod) -> StartMethod {
        let before = self.now();
        self.now.store(method as u8, Ordering::Release);
        before
    }

    /// Over which shim connection the template was made ready for `method`.
    pub fn prepared(&self, method: StartMethod) -> u64 {
        self.prepared[method as usize].load(Ordering::Acquire)
    }

    /// Notes that the template was made ready for `method` over the shim connection `epoch`.
    pub fn set_prepared(&self, method: StartMethod, epoch: u64) {
        self.prepared[method as usize].store(epoch, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_is_found_by_its_name_alone() {
        for method in StartMethod::ALL {
            assert_eq!(StartMethod::parse(method.name()), Ok(method));
        }
        for name in ["", "Template", "CRIU", "template "] {
            let refused = StartMethod::parse(name).unwrap_err();
            assert!(
                refused.contains("reap, faasnap, spice, copy-base, attach, criu, criu-lazy"),
                "{refused}"
            );
        }
        let refused = StartMethod::parse("criu-mmap").unwrap_err();
        assert!(refused.contains("criu or criu-lazy"), "{refused}");
    }

    #[test]
    fn each_method_is_made_ready_by_itself() {
        let methods = Methods::default();
        assert_eq!(methods.now(), StartMethod::Template);
        methods.set_prepared(StartMethod::Template, 7);
        for method in StartMethod::ALL {
            assert_eq!(
                methods.prepared(method) == 7,
                method == StartMethod::Template
            );
            let before = methods.now();
            assert_eq!(methods.set(method), before);
            assert_eq!(methods.now(), method);
        }
    }
}
