//! Functions that are made from a base: another function of their namespace, which is the language's
//! runtime without a handler.
//!
//! Such a function is not run from its image's command. An instance of the base is started in the
//! function's layers, loads the handler and is dumped: so the function's memory has the base's layout
//! and most of its pages, and the shim keeps these once for all functions of the base. Environment
//! variables of the function's own are handed over when it loads the handler.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{
    FunctionError, FunctionName, Functions, Process, Revision, RevisionState, StartMethod, Template,
};

/// The annotation that names a function's base.
pub const BASE_ANNOTATION: &str = "dev.trenv.base";

/// Variables that a runtime, its loader or the watchdog reads when it starts. A base has done so.
const READ_AT_START: [&str; 29] = [
    "HOST",
    "LANG",
    "LANGUAGE",
    "PORT",
    "UV_THREADPOOL_SIZE",
    "buffer_http",
    "cgi_headers",
    "combine_output",
    "content_type",
    "exec_timeout",
    "fprocess",
    "function_process",
    "hard_timeout",
    "healthcheck_interval",
    "http_buffer_req_body",
    "http_upstream_url",
    "log_buffer_size",
    "max_inflight",
    "metrics_port",
    "mode",
    "port",
    "prefix_logs",
    "read_timeout",
    "ready_path",
    "suppress_lock",
    "threads",
    "upstream_url",
    "write_debug",
    "write_timeout",
];
/// How the names of more of them begin.
const READ_AT_START_BEGIN: [&str; 6] = ["GLIBC_", "LC_", "LD_", "MALLOC_", "NODE_", "PYTHON"];

/// Variables by which a function's environment differs from its base's; those without a value are
/// the base's alone.
pub type Variables = BTreeMap<String, Option<String>>;

/// The template that a function's own was made from, as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseTemplate {
    pub function: String,
    pub id: String,
    pub generation: u64,
}

/// A base whose template is there.
#[derive(Debug, Clone)]
pub struct Base {
    pub revision: Arc<Revision>,
    pub template: Template,
}

impl Base {
    /// What a function of it has in its environment otherwise.
    pub fn variables_of(&self, function: &Revision) -> Variables {
        variables(&function.record.process, &self.revision.record.process)
    }

    /// What is stored of it.
    pub fn record(&self) -> BaseTemplate {
        BaseTemplate {
            function: self.revision.function().name.clone(),
            id: self.template.id.clone(),
            generation: self.template.generation,
        }
    }
}

/// What an instance starts from: the template of its function, or that of the base.
#[derive(Debug, Clone)]
pub struct Source {
    pub owner: Arc<Revision>,
    pub template: Template,
    pub method: StartMethod,
}

impl Source {
    /// What starts of `revision`, whose template is `template`, use by `method`.
    pub fn of(revision: &Arc<Revision>, template: &Template, method: StartMethod) -> Self {
        match (method, revision.base()) {
            // Nobody hands anything over to what the first call loads.
            (StartMethod::CopyBase, Some(base)) if base.variables_of(revision).is_empty() => Self {
                owner: base.revision,
                template: base.template,
                method: StartMethod::Copy,
            },
            // Or its base is another one by now: what it would be with it is in its own template.
            (StartMethod::CopyBase, _) => Self::of(revision, template, StartMethod::Copy),
            _ => Self {
                owner: Arc::clone(revision),
                template: template.clone(),
                method,
            },
        }
    }
}

impl Functions {
    /// The current revision of a function's base.
    fn base_revision(&self, function: &FunctionName, base: &str) -> Option<Arc<Revision>> {
        let name = FunctionName {
            namespace: function.namespace.clone(),
            name: base.to_owned(),
        };
        Some(self.get(&name)?.current())
    }

    /// Checks that the base of a deployment can be one for a function with this process.
    pub(super) fn check_base(
        &self,
        function: &FunctionName,
        base: &str,
        process: &Process,
    ) -> Result<(), FunctionError> {
        let refuse = |reason: String| Err(FunctionError::Invalid(reason));
        if base == function.name {
            return refuse(format!(
                "The function {base} cannot be its own base; let {BASE_ANNOTATION} name another"
            ));
        }
        let Some(revision) = self.base_revision(function, base) else {
            return refuse(format!(
                "The base {base} is not deployed in the namespace {}; deploy it first",
                function.namespace
            ));
        };
        match difference(process, &revision.record.process) {
            Some(what) => refuse(format!(
                "The function cannot be made from {base}, whose process it gets: {what}; build its image from the base's and deploy it with the same environment, or without the annotation {BASE_ANNOTATION}"
            )),
            None => Ok(()),
        }
    }

    /// The base of a revision that is to be built, once its template is there; none where the
    /// function has no base.
    ///
    /// # Errors
    /// A sentence that says why the base cannot be used: the function is built without it then.
    pub(super) async fn await_base(&self, revision: &Revision) -> Result<Option<Base>, String> {
        let Some(name) = &revision.record.base else {
            return Ok(None);
        };
        let base = self.base_revision(revision.function(), name);
        let base = base.ok_or_else(|| format!("its base {name} is not deployed any more"))?;
        if let Some(what) = difference(&revision.record.process, &base.record.process) {
            return Err(format!("its base {name} has changed: {what}"));
        }
        let mut states = base.watch();
        let settled = states.wait_for(|state| *state != RevisionState::Building);
        // A base whose provider ends never settles.
        let settled = timeout(self.host.ready_timeout(), settled).await.is_ok();
        match base.state() {
            RevisionState::Ready(template) => Ok(Some(Base {
                revision: base,
                template,
            })),
            _ if !settled => Err(format!("its base {name} is still being built")),
            state => Err(format!(
                "its base {name} has no template: {}",
                state.reason().unwrap_or("it is being built")
            )),
        }
    }

    /// Whether a function that is built again would be made from another template of its base.
    pub(super) fn has_newer_base(&self, revision: &Revision) -> bool {
        let (Some(name), Some(made)) = (&revision.record.base, revision.template()) else {
            return false;
        };
        let base = self.base_revision(revision.function(), name);
        let now = base.and_then(|revision| {
            let template = revision.template()?;
            Some(Base { revision, template }.record())
        });
        now.is_some() && now != made.base
    }

    /// Finds the bases of functions that were made by an earlier provider.
    pub(super) fn find_bases(&self) {
        for function in self.list(None) {
            let revision = function.current();
            let Some(stored) = revision.template().and_then(|template| template.base) else {
                continue;
            };
            let base = self.base_revision(&function.name, &stored.function);
            let base = base.and_then(|revision| {
                let template = revision.template()?;
                Some(Base { revision, template })
            });
            revision.set_base(base.filter(|base| base.record() == stored));
        }
    }
}

/// What of a function's process would not be as its deployment says, in an instance of its base.
fn difference(function: &Process, base: &Process) -> Option<String> {
    let differ = |what: &str, its: &dyn std::fmt::Debug, other: &dyn std::fmt::Debug| {
        Some(format!("its {what} is {its:?}, the base's {other:?}"))
    };
    if function.args != base.args {
        return differ("command", &function.args, &base.args);
    }
    if function.cwd != base.cwd {
        return differ("working directory", &function.cwd, &base.cwd);
    }
    let user = |process: &Process| (process.uid, process.gid, process.groups.clone());
    if user(function) != user(base) {
        return differ("user", &user(function), &user(base));
    }
    let fixed = variables(function, base).into_keys().find(|name| {
        let begins = |start: &&str| name.starts_with(*start);
        READ_AT_START.contains(&name.as_str()) || READ_AT_START_BEGIN.iter().any(begins)
    });
    fixed.map(|name| {
        format!("the variable {name}, which is read before a function is loaded, is not the base's")
    })
}

fn variables(function: &Process, base: &Process) -> Variables {
    let (own, theirs) = (pairs(function), pairs(base));
    let mut all: Variables = theirs.keys().map(|name| (name.to_string(), None)).collect();
    all.extend(
        own.iter()
            .map(|(name, value)| (name.to_string(), Some(value.to_string()))),
    );
    all.retain(|name, value| theirs.get(name.as_str()).copied() != value.as_deref());
    all
}

fn pairs(process: &Process) -> BTreeMap<&str, &str> {
    let entries = process.env.iter();
    entries.filter_map(|entry| entry.split_once('=')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_not_the_base_s_is_told() {
        let base = Process {
            args: vec!["fwatchdog".into()],
            env: vec!["A=1".into(), "B=2".into()],
            cwd: "/".into(),
            ..Process::default()
        };
        assert_eq!(difference(&base, &base), None);
        let mut other = base.clone();
        other.env.reverse();
        assert_eq!(difference(&other, &base), None);
        for name in ["exec_timeout", "PYTHONPATH"] {
            let mut other = base.clone();
            other.env.push(format!("{name}=3"));
            for (one, two) in [(&other, &base), (&base, &other)] {
                let told = difference(one, two).unwrap();
                assert!(told.contains(name) && !told.contains('3'), "{told}");
            }
        }
        let user = Process {
            uid: 7,
            ..base.clone()
        };
        assert!(difference(&user, &base).unwrap().contains("user"));
    }

    #[test]
    fn variables_of_its_own_are_those_that_the_base_has_not() {
        let process = |env: &[&str]| Process {
            env: env.iter().map(ToString::to_string).collect(),
            ..Process::default()
        };
        let base = process(&["A=1", "B=2", "C=3"]);
        let function = process(&["C=3", "D=x=y", "B=4"]);
        assert_eq!(difference(&function, &base), None);
        let own = variables(&function, &base);
        let expected = [("A", None), ("B", Some("4")), ("D", Some("x=y"))];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.map(str::to_owned)));
        assert_eq!(own, Variables::from(expected));
        assert!(variables(&base, &base).is_empty());
    }
}
