//! Text and JSON of what the library says.

use std::io::Write;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use trenv_devices::DaxDevice;
use trenv_pool::{
    Extent, PAGE_SIZE, PoolError, PoolStat, Source, TemplateId, TemplateInfo, TemplateReader,
    Usage, Verification, check_device,
};

fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    writeln!(out)?;
    Ok(())
}

/// A size for people: at most four digits and a unit.
fn size(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in units {
        if value < 1000.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {unit}")
    }
}

fn pages(count: u64) -> String {
    size(count * PAGE_SIZE as u64)
}

/// Seconds since 1970 as `2026-11-21 08:15:00` (UTC).
fn time(seconds: u64) -> String {
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    let time = Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX);
    time.strftime("%F %T").to_string()
}

fn one_line(key: &str) -> String {
    let mut line: String = key
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(60)
        .collect();
    if key.chars().nth(60).is_some() {
        line.push_str("...");
    }
    line
}

pub fn devices(devices: &[DaxDevice], json: bool) -> anyhow::Result<()> {
    if json {
        return print_json(&devices);
    }
    let mut out = std::io::stdout().lock();
    for device in devices {
        let name = &device.name;
        match check_device(device) {
            Ok(()) => writeln!(
                out,
                "{name}: {} in pages of {PAGE_SIZE} bytes",
                size(device.size)
            )?,
            Err(fault) => writeln!(out, "{name}: {fault}")?,
        }
    }
    if devices.is_empty() {
        writeln!(out, "This machine has no device-dax.")?;
    }
    Ok(())
}

pub fn list(usage: &[Usage], json: bool) -> anyhow::Result<()> {
    if json {
        return print_json(&usage);
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:<12}  {:>10}  {:>10}  {:>10}  {:>10}  {:<19}  KEY",
        "TEMPLATE", "GENERATION", "MEMORY", "STORED", "UNIQUE", "CREATED (UTC)"
    )?;
    for Usage {
        info,
        unshared_bytes,
    } in usage
    {
        writeln!(
            out,
            "{:.12}  {:>10}  {:>10}  {:>10}  {:>10}  {}  {}",
            info.id.to_string(),
            info.generation,
            pages(info.pages),
            pages(info.stored_pages),
            size(*unshared_bytes),
            time(info.created),
            one_line(&info.key),
        )?;
    }
    Ok(())
}

pub fn stat(stat: &PoolStat, json: bool) -> anyhow::Result<()> {
    if json {
        return print_json(stat);
    }
    let mut out = std::io::stdout().lock();
    let lines = [
        ("pool", stat.path.display().to_string()),
        ("backend", stat.backend.to_string()),
        ("uuid", stat.uuid.clone()),
        ("format", format!("version {}", stat.version)),
        ("size", size(stat.size)),
        ("free", size(stat.free_bytes)),
        ("templates", stat.templates.to_string()),
        ("superseded", stat.superseded.to_string()),
        ("memory", size(stat.logical_bytes)),
        ("stored", size(stat.stored_bytes)),
        ("shared", size(stat.shared_bytes)),
        ("zero pages", size(stat.zero_bytes)),
        ("manifests", size(stat.manifest_bytes)),
    ];
    for (name, value) in lines {
        writeln!(out, "{name:<12}{value}")?;
    }
    if stat.damaged_records > 0 {
        writeln!(
            out,
            "{:<12}{} record(s); `trenv-pool verify` names them",
            "damaged", stat.damaged_records
        )?;
    }
    Ok(())
}

pub fn template(reader: &TemplateReader, manifest: bool, json: bool) -> anyhow::Result<()> {
    let info = reader.info();
    let mut out = std::io::stdout().lock();
    if manifest {
        out.write_all(reader.manifest())?;
        return Ok(());
    }
    if json {
        drop(out);
        return print_json(&json!({ "template": info, "extents": reader.extents() }));
    }
    let lines = [
        ("template", info.id.to_string()),
        ("generation", info.generation.to_string()),
        ("created", format!("{} UTC", time(info.created))),
        ("memory", pages(info.pages)),
        ("stored", pages(info.stored_pages)),
        ("manifest", size(info.manifest_bytes)),
        ("key", info.key.clone()),
    ];
    for (name, value) in lines {
        writeln!(out, "{name:<12}{value}")?;
    }
    writeln!(out, "\n{:>10}  {:>10}  SOURCE", "PAGE", "PAGES")?;
    for Extent {
        first_page,
        pages,
        source,
    } in reader.extents()
    {
        let source = match source {
            Source::Zero => "zero".to_owned(),
            Source::Data { offset } => format!("pool byte {offset}"),
        };
        writeln!(out, "{first_page:>10}  {pages:>10}  {source}")?;
    }
    Ok(())
}

pub fn removed(ids: &[TemplateId], json: bool) -> anyhow::Result<()> {
    if json {
        return print_json(&json!({ "removed": ids }));
    }
    for id in ids {
        println!("Removed {id}");
    }
    Ok(())
}

pub fn checked(info: &TemplateInfo, fault: Option<&PoolError>) {
    let verdict = fault.map_or_else(|| "ok".to_owned(), ToString::to_string);
    println!(
        "{:.12}  generation {:<6}{:>10}  {verdict}",
        info.id.to_string(),
        info.generation,
        pages(info.stored_pages)
    );
}

pub fn verification(found: &Verification, json: bool) -> anyhow::Result<()> {
    let faults: Vec<String> = found.faults.iter().map(ToString::to_string).collect();
    if json {
        return print_json(&json!({
            "templates": found.templates,
            "pages": found.pages,
            "faults": faults,
        }));
    }
    println!(
        "{} template(s), {} checked, {} fault(s)",
        found.templates,
        pages(found.pages),
        faults.len()
    );
    for fault in faults {
        println!("  {fault}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_calendar_dates() {
        assert_eq!(time(0), "1970-01-01 00:00:00");
        assert_eq!(time(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(time(1_795_249_027), "2026-11-21 08:17:07");
    }

    #[test]
    fn sizes_have_a_fitting_unit() {
        assert_eq!(size(999), "999 B");
        assert_eq!(size(4096), "4.0 KiB");
        assert_eq!(size(3 << 30), "3.0 GiB");
    }
}
