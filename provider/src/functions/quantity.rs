//! Memory and CPU as people write them: "128Mi", "1G", "500m", "0.5".

/// Bytes of a memory quantity. A lower-case `m` means MiB here: thousandths of a byte make no
/// sense, and many existing stacks write "128m".
pub fn parse_memory(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim() {
        "" | "B" | "b" => 1,
        "k" | "K" | "kB" | "KB" => 1000,
        "M" | "MB" => 1_000_000,
        "G" | "GB" => 1_000_000_000,
        "T" | "TB" => 1_000_000_000_000,
        "Ki" | "KiB" => 1 << 10,
        "Mi" | "MiB" | "m" => 1 << 20,
        "Gi" | "GiB" | "g" => 1 << 30,
        "Ti" | "TiB" => 1 << 40,
        _ => return None,
    };
    scale(number, factor)
}

/// Thousandths of a CPU.
pub fn parse_cpu(text: &str) -> Option<u64> {
    let text = text.trim();
    match text.strip_suffix('m') {
        Some(millis) => scale(millis, 1),
        None => scale(text, 1000),
    }
}

fn scale(number: &str, factor: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.len() > 9 {
        return None;
    }
    let read = |digits: &str| match digits {
        "" => Some(0),
        _ if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse::<u64>().ok(),
        _ => None,
    };
    let whole = read(whole)?.checked_mul(factor)?;
    let power = 10u64.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let part = u128::from(read(fraction)?) * u128::from(factor) / u128::from(power);
    whole.checked_add(u64::try_from(part).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_in_all_notations() {
        assert_eq!(parse_memory("128Mi"), Some(128 << 20));
        assert_eq!(parse_memory("128m"), Some(128 << 20));
        assert_eq!(parse_memory("1.5Gi"), Some(3 << 29));
        assert_eq!(parse_memory("20M"), Some(20_000_000));
        assert_eq!(parse_memory("4096"), Some(4096));
    }

    #[test]
    fn cpu_in_all_notations() {
        assert_eq!(parse_cpu("100m"), Some(100));
        assert_eq!(parse_cpu("0.5"), Some(500));
        assert_eq!(parse_cpu("2"), Some(2000));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "x", "-1", "12Qi", "1..2", "99999999999999999999Gi"] {
            assert_eq!(parse_memory(text), None, "{text}");
            assert_eq!(parse_cpu(text), None, "{text}");
        }
    }
}
