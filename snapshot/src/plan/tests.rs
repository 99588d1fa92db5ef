//! Plans of a small tree.

use trenv_pool::Source;

use super::*;
use crate::manifest::{
    Credentials, Descriptor, Layout, Mapping, MappingFlags, Object, ObjectKind, PageRun, Process,
    Registers, Thread, VERSION,
};

fn mapping(start: u64, pages: u64, kind: MappingKind) -> Mapping {
    let flags = MappingFlags::default();
    Mapping {
        start,
        end: start + pages * PAGE,
        protection: 3,
        kind,
        flags,
        guards: Vec::new(),
    }
}

fn process(pid: i32, parent: Option<usize>, own: Vec<Mapping>) -> Process {
    let mut mappings = own;
    mappings.push(mapping(0x7ffd_0000_0000, 2, MappingKind::Vvar));
    mappings.push(mapping(0x7ffd_0000_2000, 2, MappingKind::Vdso));
    Process {
        pid,
        parent,
        group: 2,
        session: 2,
        exe: "/bin/x".into(),
        cwd: "/".into(),
        umask: 0o022,
        layout: Layout::default(),
        auxv: vec![0; 16],
        pages: vec![PageRun {
            start: mappings[0].start,
            pages: 1,
        }],
        mappings,
        lock_future: 0,
        descriptors: vec![Descriptor {
            number: 3,
            object: 0,
            close_on_exec: true,
        }],
        actions: Vec::new(),
        timers: [[0; 4]; 3],
        posix_timers: Vec::new(),
        limits: vec![(1, 2)],
        pending: vec![vec![0; 128]],
        dumpable: 1,
        habits: crate::manifest::Habits::default(),
        subreaper: 0,
        oom_score_adj: 0,
        core_filter: 0x33,
        autogroup: 0,
        threads: vec![Thread {
            tid: pid,
            name: "x".into(),
            registers: Registers::default(),
            xstate: vec![0; 2440],
            blocked: 0,
            alternate_stack: (0, 2, 0),
            robust_list: (0x1000, 24),
            clear_tid: 0x1000,
            rseq: None,
            pending: Vec::new(),
            nice: 0,
            scheduling: (0, 0),
            affinity: None,
            parent_death_signal: 0,
            timer_slack: 50_000,
            io_priority: 0,
            credentials: Credentials::default(),
            no_new_privileges: true,
            filters: vec![0],
        }],
    }
}

pub fn sample() -> (Manifest, Vec<Extent>) {
    let file = MappingKind::File {
        path: "/bin/x".into(),
        offset: 0,
    };
    let manifest = Manifest {
        version: VERSION,
        fingerprint: "f".into(),
        clocks: crate::clock::Clocks::default(),
        processes: vec![
            process(2, None, vec![mapping(0x40_0000, 4, MappingKind::Anonymous)]),
            process(
                3,
                Some(0),
                vec![
                    mapping(0x40_0000, 4, MappingKind::Anonymous),
                    mapping(0x50_0000, 4, file),
                    mapping(0x60_0000, 2, shared::sample::of(0)),
                    mapping(0x70_0000, 1, shared::sample::of(1)),
                    mapping(0x80_0000, 2, MappingKind::Segment { id: 7 }),
                ],
            ),
        ],
        zombies: Vec::new(),
        objects: vec![Object {
            flags: 0,
            owner: None,
            kind: ObjectKind::Path {
                path: "/dev/null".into(),
                position: 0,
            },
        }],
        memory: shared::sample::objects(),
        locks: Vec::new(),
        semaphores: Vec::new(),
        message_queues: Vec::new(),
        tmpfs: Vec::new(),
        filters: vec![vec![6]],
    };
    let extents = vec![Extent {
        first_page: 0,
        pages: 6,
        source: Source::Data { offset: 0 },
    }];
    (manifest, extents)
}

fn ways(sizes: &[u64], parents: &[Option<usize>], fill: Fill) -> Vec<Way> {
    let (mut manifest, _) = sample();
    let template = manifest.processes.remove(0);
    manifest.processes = sizes
        .iter()
        .zip(parents)
        .enumerate()
        .map(|(index, (pages, parent))| Process {
            pid: 2 + index as i32,
            parent: *parent,
            pages: vec![PageRun {
                start: template.mappings[0].start,
                pages: *pages,
            }],
            ..template.clone()
        })
        .collect();
    let lineage = Lineage::of(&manifest).unwrap();
    Placement::of(&manifest, lineage, REGION_LIMIT, &[], fill)
        .unwrap()
        .ways
}

#[test]
fn the_largest_process_below_small_ones_gets_the_memory() {
    use Way::{Forked, Heir, Loaded};
    let skeleton = Fill::Skeleton { watched: false };
    let both = |sizes, parents| {
        let ways = ways(sizes, parents, Fill::Pages);
        assert_eq!(ways, super::tests::ways(sizes, parents, skeleton));
        ways
    };
    assert_eq!(both(&[5000], &[None]), [Heir]);
    let parents = [None, Some(0), Some(0)];
    assert_eq!(both(&[50, 900, 800], &parents), [Loaded, Heir, Forked]);
    // A large parent cannot make room for its child.
    let sizes = [300, 9000, 10];
    assert_eq!(ways(&sizes, &parents, skeleton), [Heir, Forked, Loaded]);
    for filled in [Fill::Pages, Fill::Attached] {
        assert_eq!(ways(&sizes, &parents, filled), [Heir, Forked, Forked]);
    }
    let line = [None, Some(0), Some(1)];
    assert_eq!(both(&[50, 20, 900], &line), [Loaded, Loaded, Heir]);
}

#[test]
fn processes_are_loaded_only_as_far_as_there_are_descriptors() {
    let count = trenv_restorer::wire::MAX_LOADED + 3;
    let mut parents = vec![Some(0); count];
    parents[0] = None;
    let mut sizes = vec![5; count];
    sizes[1] = 5000;
    let skeleton = Fill::Skeleton { watched: false };
    let ways = ways(&sizes, &parents, skeleton);
    let loaded = ways.iter().filter(|way| **way == Way::Loaded).count();
    assert_eq!(loaded, count - 3);
    assert_eq!((ways[0], ways[1]), (Way::Loaded, Way::Heir));
    assert_eq!(ways[count - 1], Way::Forked);
}

#[test]
fn mappings_in_the_way_of_the_heir_are_staged() {
    let (mut manifest, _) = sample();
    for process in &mut manifest.processes {
        process.mappings[0].end = process.mappings[0].start + 300 * PAGE;
        process.pages[0].pages = 300;
    }
    manifest.processes[1].mappings[1].start += 300 * PAGE;
    manifest.processes[1].mappings[1].end += 300 * PAGE;
    let lineage = Lineage::of(&manifest).unwrap();
    let placement = Placement::of(&manifest, lineage, REGION_LIMIT, &[], Fill::Pages).unwrap();
    assert_eq!(placement.ways, [Way::Heir, Way::Forked]);
    let staged = placement.of_process(1).next().unwrap();
    assert_ne!(staged.at, 0x40_0000);
    let unmapped = placement.foreign(1, &manifest);
    assert_eq!(unmapped, vec![(0x40_0000, 0x40_0000 + 300 * PAGE)]);
}

#[test]
fn pages_that_do_not_match_the_manifest_are_an_error() {
    let (manifest, mut extents) = sample();
    assert!(Plan::of(&manifest, &extents, Fill::Pages).is_ok());
    extents[0].pages = 1;
    assert!(matches!(
        Plan::of(&manifest, &extents, Fill::Pages),
        Err(PlanError::Pages)
    ));
    extents[0].pages = 3;
    assert!(matches!(
        Plan::of(&manifest, &extents, Fill::Pages),
        Err(PlanError::Pages)
    ));
}

#[test]
fn a_blank_has_a_program_that_attaches() {
    let (manifest, extents) = sample();
    let attach = std::mem::offset_of!(Header, attach);
    for (fill, attaches) in [
        (Fill::Pages, false),
        (Fill::Attached, false),
        (Fill::Skeleton { watched: false }, false),
        (Fill::Blank, true),
    ] {
        let plan = Plan::of(&manifest, &extents, fill).unwrap();
        assert!(plan.areas.iter().any(|area| area.attachable));
        let at = (plan.header - plan.base) as usize + attach;
        let word = u64::from_ne_bytes(plan.bytes[at..at + 8].try_into().unwrap());
        assert_eq!(word != 0, attaches, "{fill:?}");
    }
}

#[test]
fn a_rework_has_its_room_in_the_region() {
    let (manifest, extents) = sample();
    for (fill, length) in [
        (Fill::Pages, super::base::ARRIVAL),
        (Fill::Skeleton { watched: false }, skeleton::REWORK),
    ] {
        let plan = Plan::of(&manifest, &extents, fill).unwrap();
        let room = plan.rework..plan.rework + length;
        let region = plan.base..plan.base + plan.length;
        assert!(region.start < room.start && room.end <= region.end);
    }
}

#[test]
fn as_many_maps_as_fit_have_their_advice_too() {
    let with = |flags| {
        let map = skeleton::Map {
            at: 0x1000,
            length: PAGE,
            protection: 3,
            flags,
            file: 0,
            offset: 0,
        };
        let maps = vec![map; 20_000];
        let fitting = skeleton::fitting(&maps).len();
        let program = skeleton::rework(&maps[..fitting], 7);
        assert!(program.len() as u64 <= skeleton::REWORK, "{fitting} maps");
        fitting
    };
    let plain = with(MappingFlags::default());
    let advised = with(MappingFlags {
        dont_dump: true,
        random: true,
        ..MappingFlags::default()
    });
    assert!(plain > 9000, "{plain}");
    assert_eq!(advised, plain / 3);
}

#[test]
fn memory_with_guard_pages_is_not_attached() {
    let (mut manifest, extents) = sample();
    let mapping = &mut manifest.processes[1].mappings[0];
    mapping.guards = vec![PageRun {
        start: mapping.start + 2 * PAGE,
        pages: 1,
    }];
    let plan = Plan::of(&manifest, &extents, Fill::Attached).unwrap();
    let area = plan.areas.iter().find(|area| area.process == 1).unwrap();
    assert!(!area.attachable);
    let guarded = |from: u64, to: u64| area.has_guard(area.at + from * PAGE, area.at + to * PAGE);
    assert!(guarded(2, 3) && guarded(0, 4));
    assert!(!guarded(0, 2) && !guarded(3, 4));
}

/// A base's zygote that holds nothing, and notes what is compared with it.
#[derive(Default)]
struct Compared(std::cell::RefCell<Vec<u64>>);

impl base::BaseMemory for Compared {
    fn differences(
        &self,
        part: &Mapping,
        _: &[memory::Piece],
    ) -> std::io::Result<base::Differences> {
        self.0.borrow_mut().push(part.start);
        Ok(base::Differences::default())
    }
}

/// Who brings pages of files into a zygote cannot read its guard pages.
#[test]
fn no_pages_of_files_are_guards() {
    let (mut manifest, extents) = sample();
    let start = manifest.processes[1].mappings[1].start;
    let plan = Plan::of(&manifest, &extents, Fill::Pages).unwrap();
    // The zygote has them elsewhere.
    let at = plan.file_pages[0].at;
    for (guards, expected) in [
        (&[][..], &[(0, 4)][..]),
        (&[(1, 1)], &[(0, 1), (2, 2)]),
        (&[(0, 1), (1, 1)], &[(2, 2)]),
        (&[(2, 2)], &[(0, 2)]),
        (&[(0, 4)], &[]),
    ] {
        let guards = guards.iter().map(|(first, pages)| PageRun {
            start: start + first * PAGE,
            pages: *pages,
        });
        manifest.processes[1].mappings[1].guards = guards.collect();
        let plan = Plan::of(&manifest, &extents, Fill::Pages).unwrap();
        let pages = plan.file_pages.iter().map(|pages| {
            assert_eq!(pages.at - at, pages.start - start);
            ((pages.start - start) / PAGE, pages.pages)
        });
        assert_eq!(pages.collect::<Vec<_>>(), expected);
    }
}

#[test]
fn guard_pages_are_not_made_in_what_a_base_has_attached() {
    let (manifest, extents) = sample();
    let mut function = manifest.clone();
    // The heir's, which is the root.
    let start = function.processes[0].mappings[0].start;
    function.processes[0].mappings[0].guards = vec![PageRun {
        start: start + 2 * PAGE,
        pages: 1,
    }];
    for (fill, guarded, stays) in [
        (Fill::Pages, true, true),
        (Fill::Attached, true, false),
        (Fill::Attached, false, true),
    ] {
        let ground = Plan::of(&manifest, &extents, fill).unwrap().ground;
        let compared = Compared::default();
        let base = Base {
            ground: &ground,
            memory: &compared,
        };
        let function = if guarded { &function } else { &manifest };
        let plan = Plan::over(Some(base), function, &extents, Fill::Pages).unwrap();
        assert_eq!(compared.0.borrow().contains(&start), stays, "{fill:?}");
        assert_eq!(plan.ground.attached(), fill == Fill::Attached);
    }
}
