//! Faults in the kernel's log.

/// What a kernel writes when something is wrong, though it goes on.
const FAULTS: &[&str] = &[
    "BUG:",
    "BUG at",
    "kernel BUG",
    "WARNING:",
    "Oops:",
    "Kernel panic",
    "general protection fault",
    "Bad rss-counter",
    "Bad page",
    "bad pmd",
    "bad pud",
    "Bad swap",
    "non-zero pgtables_bytes",
    "KASAN",
    "UBSAN:",
    "INFO: possible",
    "INFO: task",
    "INFO: rcu",
    "rcu: INFO",
    "suspicious RCU usage",
    "soft lockup",
    "hard LOCKUP",
    "refcount_t:",
    "page_table_check",
    "pagealloc: memory corruption",
    "list_add corruption",
    "list_del corruption",
    "unregister_netdevice: waiting",
    "kmemleak:",
    "Objects remaining in",
    "Slab corruption",
];

/// Lines with one of those words that tell no fault.
const HARMLESS: &[&str] = &[
    // What KASAN says when it starts.
    "KernelAddressSanitizer initialized",
    "kmemleak: Kernel memory leak detector",
];

/// How many lines after a fault are shown with it: the call trace.
const AFTER: usize = 40;
/// How many of the last lines are shown of a hang.
const LAST: usize = 40;

/// The lines that tell of faults, each with what follows it; `None` if there are none.
pub fn faults(log: &str) -> Option<String> {
    let lines: Vec<&str> = log.lines().collect();
    let mut found = Vec::new();
    let mut until = 0;
    for (place, line) in lines.iter().enumerate() {
        if is_fault(line) {
            until = place + AFTER;
            found.push(*line);
        } else if place < until {
            found.push(*line);
        }
    }
    (!found.is_empty()).then(|| found.join("\n"))
}

pub fn last_lines(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(LAST)..].join("\n")
}

fn is_fault(line: &str) -> bool {
    FAULTS.iter().any(|fault| line.contains(fault))
        && !HARMLESS.iter().any(|harmless| line.contains(harmless))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_shown_with_its_call_trace() {
        let log = "[ 1.0] Linux version 6.1\n\
                   [ 2.0] BUG: Bad rss-counter state mm:00000000 type:MM_ANONPAGES val:1\n\
                   [ 2.1]  ? exit_mmap\n";
        let shown = faults(log).unwrap();
        assert!(shown.starts_with("[ 2.0] BUG: Bad rss"), "{shown}");
        assert!(shown.ends_with("exit_mmap"), "{shown}");
    }

    #[test]
    fn each_kind_of_fault_is_found_in_the_middle_of_a_log() {
        for line in [
            "WARNING: CPU: 1 PID: 7 at mm/memory.c:1 zap+0x1/0x2",
            "kernel BUG at mm/memory.c:7!",
            "BUG: KASAN: use-after-free in attach+0x1/0x2 [pseudo_mm]",
            "BUG: Bad page state in process a  pfn:00001",
            "WARNING: possible circular locking dependency detected",
            "INFO: task a:7 blocked for more than 120 seconds.",
            "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "watchdog: BUG: soft lockup - CPU#0 stuck for 26s!",
        ] {
            assert!(faults(&format!("[ 1.0] one\n[ 2.0] {line}\n[ 3.0] two\n")).is_some());
        }
    }

    #[test]
    fn a_clean_log_is_clean() {
        let log = "[ 0.0] Warning: unable to open an initial console.\n\
                   [ 0.1] DEBUG_PAGEALLOC is off\n\
                   [ 0.2] kasan: KernelAddressSanitizer initialized\n";
        assert_eq!(faults(log), None);
    }
}
