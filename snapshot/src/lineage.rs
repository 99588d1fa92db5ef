//! Who makes whom, so that every process comes to its parent, session and process group.
//!
//! A process is in the session that it was forked in or leads its own, so a child in another session
//! than its parent's is made before the parent's `setsid`; what a process that is gone has made is
//! made by a **stand-in** that then ends: the leader of a session or a group, or the parent of an
//! orphan, which falls to the sandbox's pid 1 or to a subreaper as it did before.

use std::collections::BTreeMap;

use nix::libc;

use crate::manifest::{Manifest, Process, Zombie};

/// Signals that would leave a core, and have everyone who shares the memory stopped for it.
const CORE_SIGNALS: [i32; 10] = [
    libc::SIGQUIT,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGSEGV,
    libc::SIGXCPU,
    libc::SIGXFSZ,
    libc::SIGSYS,
];

/// Whether a zombie has to be made with an address space of its own.
pub fn dies_alone(zombie: &Zombie) -> bool {
    CORE_SIGNALS.contains(&zombie.status)
}

/// Everyone that has to be made.
#[derive(Debug)]
pub struct Lineage {
    /// The manifest's processes in its order, then its zombies, then the stand-ins.
    pub kin: Vec<Kin>,
}

/// A process that has to be made, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kin {
    pub pid: i32,
    pub role: Role,
    /// Index of who makes it; none for the root of the tree.
    pub maker: Option<usize>,
    /// Whether it is made before its maker makes a session or group of its own.
    pub early: bool,
    pub leads_session: bool,
    pub leads_group: bool,
    /// Group to enter, where it is not born in it.
    pub joins: Option<i32>,
    /// How many enter its group.
    pub joined_by: usize,
    /// Pid of the parent that it falls to when its maker has ended.
    pub falls_to: Option<i32>,
}

/// What becomes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A process of the manifest, by index.
    Process(usize),
    /// A zombie of the manifest, by index.
    Zombie(usize),
    StandIn,
}

/// The sandbox's pid 1.
const INIT: i32 = 1;

struct Place {
    parent: Option<usize>,
    group: i32,
    session: i32,
    /// The session that it has to be born in; any, if none.
    birth: Option<i32>,
    /// Whether a maker that ends leaves it to its parent.
    adopted: bool,
}

impl Lineage {
    /// Who makes whom in the tree of a manifest.
    ///
    /// # Errors
    /// A sentence about a place in the tree that cannot be come to again.
    pub fn of(manifest: &Manifest) -> Result<Self, String> {
        Self::between(&manifest.processes, &manifest.zombies)
    }

    fn between(processes: &[Process], zombies: &[Zombie]) -> Result<Self, String> {
        let mut kin = Vec::new();
        let mut places = Vec::new();
        for (index, process) in processes.iter().enumerate() {
            kin.push(Kin::new(process.pid, Role::Process(index)));
            places.push(Place::new(process.parent, process.group, process.session));
        }
        for (index, zombie) in zombies.iter().enumerate() {
            kin.push(Kin::new(zombie.pid, Role::Zombie(index)));
            places.push(Place::new(
                Some(zombie.parent),
                zombie.group,
                zombie.session,
            ));
        }
        let mut lineage = Self { kin };
        lineage.find_births(processes, &mut places)?;
        for (one, place) in lineage.kin.iter_mut().zip(&places) {
            one.leads_session = one.pid == place.session;
            one.leads_group = one.pid == place.group;
            if one.leads_session && !one.leads_group {
                return Err(format!(
                    "process {} leads a session, but not its own group",
                    one.pid
                ));
            }
        }
        let mut stand_ins = BTreeMap::new();
        for index in 1..places.len() {
            lineage.find_maker(index, &places, &mut stand_ins)?;
        }
        lineage.check_chains(processes)?;
        for index in 0..places.len() {
            lineage.find_group(index, &places, &mut stand_ins)?;
        }
        lineage.check_makers(zombies)?;
        Ok(lineage)
    }

    /// The session that each has to be born in, children before their parents.
    fn find_births(&self, processes: &[Process], places: &mut [Place]) -> Result<(), String> {
        let mut wanted: Vec<Option<i32>> = vec![None; places.len()];
        for index in (0..places.len()).rev() {
            let pid = self.kin[index].pid;
            let session = places[index].session;
            let birth = if session == pid {
                wanted[index]
            } else {
                Some(session)
            };
            if let Some(other) = wanted[index]
                && birth != Some(other)
            {
                return Err(format!(
                    "process {pid} of session {session} has a child in session {other}"
                ));
            }
            places[index].birth = birth;
            let (Some(birth), Some(parent)) = (birth, places[index].parent) else {
                places[index].adopted = places[index].parent.is_none();
                continue;
            };
            if places[parent].session == birth {
                continue;
            }
            if processes[parent].subreaper != 0 {
                places[index].adopted = true;
                continue;
            }
            if wanted[parent].is_some_and(|other| other != birth) {
                return Err(format!(
                    "process {} has children in more than one session that is not its own",
                    self.kin[parent].pid
                ));
            }
            wanted[parent] = Some(birth);
        }
        if let Some(birth) = wanted[0] {
            return Err(format!(
                "the root process {} has a child in session {birth}, which is older than its own",
                self.kin[0].pid
            ));
        }
        Ok(())
    }

    fn find_maker(
        &mut self,
        index: usize,
        places: &[Place],
        stand_ins: &mut BTreeMap<(i32, usize), usize>,
    ) -> Result<(), String> {
        let place = &places[index];
        match place.parent {
            Some(parent) if !place.adopted => {
                self.kin[index].maker = Some(parent);
                self.kin[index].early = place
                    .birth
                    .is_some_and(|birth| birth != places[parent].session);
            }
            parent => {
                let maker = match place.birth {
                    None => self.plain_stand_in(parent.unwrap_or(0), stand_ins),
                    Some(session) => {
                        match self.leader_of(session, parent.unwrap_or(0), places, stand_ins)? {
                            ended if self.kin[ended].role != Role::Process(ended) => ended,
                            living => self.plain_stand_in(living, stand_ins),
                        }
                    }
                };
                self.kin[index].maker = Some(maker);
                self.kin[index].falls_to = Some(parent.map_or(INIT, |parent| self.kin[parent].pid));
            }
        }
        Ok(())
    }

    /// Who is, or was, in a session from its beginning: its leader, or one that stands in for it below
    /// `maker`.
    fn leader_of(
        &mut self,
        session: i32,
        maker: usize,
        places: &[Place],
        stand_ins: &mut BTreeMap<(i32, usize), usize>,
    ) -> Result<usize, String> {
        if places[0].session == session {
            return Ok(0);
        }
        if let Some(leader) = self.kin.iter().position(|one| one.pid == session) {
            return if self.kin[leader].leads_session {
                Ok(leader)
            } else {
                Err(format!(
                    "session {session} has the number of a process that does not lead it"
                ))
            };
        }
        if session <= 0 {
            return Err(format!(
                "a process is in session {session}, which was made outside of the sandbox"
            ));
        }
        let mut leader = Kin::new(session, Role::StandIn);
        leader.maker = Some(maker);
        leader.leads_session = true;
        leader.leads_group = true;
        self.kin.push(leader);
        stand_ins.insert((session, maker), self.kin.len() - 1);
        Ok(self.kin.len() - 1)
    }

    /// A child of `maker` that ends when it has made orphans.
    fn plain_stand_in(
        &mut self,
        maker: usize,
        stand_ins: &mut BTreeMap<(i32, usize), usize>,
    ) -> usize {
        *stand_ins.entry((0, maker)).or_insert_with(|| {
            let mut made = Kin::new(0, Role::StandIn);
            made.maker = Some(maker);
            self.kin.push(made);
            self.kin.len() - 1
        })
    }

    /// Everyone must go back to the root, and an orphan must not fall to the wrong parent.
    fn check_chains(&self, processes: &[Process]) -> Result<(), String> {
        for (index, one) in self.kin.iter().enumerate() {
            let mut at = one.maker;
            let mut steps = 0;
            let mut reaper = None;
            while let Some(maker) = at {
                if let Role::Process(process) = self.kin[maker].role
                    && processes[process].subreaper != 0
                    && reaper.is_none()
                {
                    reaper = Some(self.kin[maker].pid);
                }
                steps += 1;
                if steps > self.kin.len() {
                    return Err(format!(
                        "process {} can be made by none of those in its session",
                        one.pid
                    ));
                }
                at = self.kin[maker].maker;
            }
            if index > 0 && one.maker.is_none() {
                return Err(format!("process {} has no place in the tree", one.pid));
            }
            if let Some(parent) = one.falls_to
                && reaper.unwrap_or(INIT) != parent
            {
                return Err(format!(
                    "process {} is an orphan that its nearest subreaper has not adopted",
                    one.pid
                ));
            }
        }
        Ok(())
    }

    /// One that has to die in an address space of its own cannot make others there.
    fn check_makers(&self, zombies: &[Zombie]) -> Result<(), String> {
        for (index, one) in self.kin.iter().enumerate() {
            if let Role::Zombie(zombie) = one.role
                && dies_alone(&zombies[zombie])
                && self.made_by(index).next().is_some()
            {
                return Err(format!(
                    "process {} was killed by signal {} and leads the session of orphans",
                    one.pid, zombies[zombie].status
                ));
            }
        }
        Ok(())
    }

    fn find_group(
        &mut self,
        index: usize,
        places: &[Place],
        stand_ins: &mut BTreeMap<(i32, usize), usize>,
    ) -> Result<(), String> {
        let group = places[index].group;
        // The root is born in whatever group its maker outside of the tree is in.
        if self.kin[index].leads_group || index == 0 || self.group_at_birth(index) == Some(group) {
            return Ok(());
        }
        let leader = match self.kin.iter().position(|one| one.pid == group) {
            Some(leader) if self.kin[leader].leads_group => leader,
            Some(_) => {
                return Err(format!(
                    "process {} is in group {group}, which its leader has left",
                    self.kin[index].pid
                ));
            }
            None if group <= 0 => {
                return Err(format!(
                    "process {} is in a group that was made outside of the sandbox",
                    self.kin[index].pid
                ));
            }
            None => {
                let maker = self.leader_of(places[index].session, 0, places, stand_ins)?;
                let mut leader = Kin::new(group, Role::StandIn);
                leader.maker = Some(maker);
                leader.leads_group = true;
                self.kin.push(leader);
                self.kin.len() - 1
            }
        };
        self.kin[leader].joined_by += 1;
        self.kin[index].joins = Some(group);
        Ok(())
    }

    /// The group that one is born in; none where that is not known.
    fn group_at_birth(&self, index: usize) -> Option<i32> {
        let (mut at, mut early) = (self.kin[index].maker?, self.kin[index].early);
        loop {
            let maker = &self.kin[at];
            if maker.leads_group && !early {
                return Some(maker.pid);
            }
            early = maker.early;
            at = maker.maker?;
        }
    }

    /// The process of the manifest below which process `index` is made.
    pub fn maker_process(&self, index: usize) -> Option<usize> {
        let mut at = self.kin.get(index)?.maker;
        while let Some(maker) = at {
            if let Role::Process(process) = self.kin[maker].role {
                return Some(process);
            }
            at = self.kin[maker].maker;
        }
        None
    }

    /// Those that `index` makes.
    pub fn made_by(&self, index: usize) -> impl Iterator<Item = (usize, &Kin)> {
        let all = self.kin.iter().enumerate();
        all.filter(move |(_, one)| one.maker == Some(index))
    }
}

impl Kin {
    fn new(pid: i32, role: Role) -> Self {
        Self {
            pid,
            role,
            maker: None,
            early: false,
            leads_session: false,
            leads_group: false,
            joins: None,
            joined_by: 0,
            falls_to: None,
        }
    }
}

impl Place {
    fn new(parent: Option<usize>, group: i32, session: i32) -> Self {
        Self {
            parent,
            group,
            session,
            birth: None,
            adopted: false,
        }
    }
}
