//! The one nft table that is ours: what leaves the sandboxes' subnet gets the host's address.

use std::{
    io::Write,
    process::{Command, Stdio},
};

use ipnetwork::Ipv4Network;

use crate::NetworkError;

/// Puts the table in place, in one transaction, whatever stood in it before.
pub fn load(table: &str, subnet: Ipv4Network) -> Result<(), NetworkError> {
    run(
        table,
        &format!(
            "table ip {table}\n\
             delete table ip {table}\n\
             table ip {table} {{\n\
             chain postrouting {{\n\
             type nat hook postrouting priority 100; policy accept;\n\
             ip saddr {subnet} ip daddr != {subnet} masquerade\n\
             }}\n\
             }}\n"
        ),
    )
}

/// Removes the table; none there is fine.
pub fn unload(table: &str) -> Result<(), NetworkError> {
    run(
        table,
        &format!("table ip {table}\ndelete table ip {table}\n"),
    )
}

fn run(table: &str, text: &str) -> Result<(), NetworkError> {
    let failed = |reason: String| NetworkError::Nft {
        table: table.to_owned(),
        reason,
    };
    let name_ok = !table.is_empty()
        && table.len() < 32
        && table
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if !name_ok {
        return Err(failed("the name must be of letters, digits and _".into()));
    }
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(format!("nft cannot be run ({error})")))?;
    if let Some(mut stdin) = nft.stdin.take() {
        // When nft ends before reading all, its status says why.
        let _ = stdin.write_all(text.as_bytes());
    }
    let output = nft
        .wait_with_output()
        .map_err(|error| failed(format!("nft cannot be waited for ({error})")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(failed(
        said.lines().next().unwrap_or("no reason").to_owned(),
    ))
}
