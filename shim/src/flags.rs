//! The command line that containerd uses, in Go's notation: `-name value`, `--name=value`, then an action.

use std::ffi::OsString;

/// What this run of the binary is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Serve,
    Start,
    Delete,
    Version,
}

/// The parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flags {
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's gRPC socket.
    pub address: String,
    /// The containerd binary, for `containerd publish`.
    pub publish_binary: String,
    /// The container's id.
    pub id: String,
    /// The bundle directory; only `delete` gets it, the others run inside it.
    pub bundle: String,
    /// The address to serve, from `start` to the daemon.
    pub socket: String,
    pub debug: bool,
}

/// Why the command line cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FlagsError {
    #[error("The argument {0:?} is not valid UTF-8")]
    Encoding(OsString),
    #[error("The flag -{0} is not known; containerd calls this binary, it is not meant for hands")]
    Unknown(String),
    #[error("The flag -{0} needs a value")]
    Value(String),
    #[error("The action {0:?} is not known; use start or delete")]
    Action(String),
    #[error("The flag -{0} is missing")]
    Missing(&'static str),
}

impl Flags {
    /// Parses the arguments after the program's name.
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, FlagsError> {
        let mut flags = Self {
            action: Action::Serve,
            namespace: String::new(),
            address: String::new(),
            publish_binary: String::new(),
            id: String::new(),
            bundle: String::new(),
            socket: String::new(),
            debug: false,
        };
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let argument = argument.into_string().map_err(FlagsError::Encoding)?;
            let Some(flag) = argument.strip_prefix('-') else {
                flags.action = match argument.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    _ => return Err(FlagsError::Action(argument)),
                };
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, mut value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match name {
                "debug" => {
                    flags.debug = value.is_none_or(|value| value != "false");
                    continue;
                }
                "v" | "version" => {
                    flags.action = Action::Version;
                    return Ok(flags);
                }
                _ => {}
            }
            let field = match name {
                "namespace" => &mut flags.namespace,
                "address" => &mut flags.address,
                "publish-binary" => &mut flags.publish_binary,
                "id" => &mut flags.id,
                "bundle" => &mut flags.bundle,
                "socket" => &mut flags.socket,
                _ => return Err(FlagsError::Unknown(name.into())),
            };
            if value.is_none() {
                let next = arguments
                    .next()
                    .ok_or_else(|| FlagsError::Value(name.into()))?;
                value = Some(next.into_string().map_err(FlagsError::Encoding)?);
            }
            *field = value.unwrap_or_default();
        }
        if flags.namespace.is_empty() {
            return Err(FlagsError::Missing("namespace"));
        }
        if flags.id.is_empty() && flags.action != Action::Serve {
            return Err(FlagsError::Missing("id"));
        }
        Ok(flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags, FlagsError> {
        Flags::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn containerds_own_line_is_understood() {
        let flags = parse(
            "-namespace default -address /run/c.sock -publish-binary /usr/bin/containerd -id a1 -debug start",
        )
        .unwrap();
        assert_eq!(flags.action, Action::Start);
        assert_eq!(flags.namespace, "default");
        assert_eq!(flags.address, "/run/c.sock");
        assert_eq!(flags.id, "a1");
        assert!(flags.debug);
    }

    #[test]
    fn both_notations_mean_the_same() {
        assert_eq!(
            parse("--namespace=n --id=i delete"),
            parse("-namespace n -id i delete")
        );
    }

    #[test]
    fn a_wrong_line_names_what_is_wrong() {
        assert_eq!(parse("-id i start"), Err(FlagsError::Missing("namespace")));
        assert_eq!(parse("-namespace n start"), Err(FlagsError::Missing("id")));
        assert_eq!(
            parse("-namespace"),
            Err(FlagsError::Value("namespace".into()))
        );
        assert_eq!(parse("-nme n"), Err(FlagsError::Unknown("nme".into())));
        assert_eq!(parse("stop"), Err(FlagsError::Action("stop".into())));
    }

    #[test]
    fn version_needs_nothing_else() {
        assert_eq!(parse("-v").unwrap().action, Action::Version);
    }
}
