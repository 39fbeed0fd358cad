//! A whole table: stage 2 for every version, with fallback.
//!
//! Owns which backends a version's buckets may go to, and what is remembered from one
//! compilation to the next. Must not know how buckets are placed among them.

use std::{fmt, sync::Arc};

use super::{
    BackendsError, OwnersError, Placement,
    backends::{Its, Placer},
    owners, placement,
};
use crate::abi::MAX_VERSIONS;

/// One server of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// [`super::identity`] of its address; distinct within a version.
    pub identity: u64,
    /// Its part of the version's buckets, relative to the others'; 0 for none. In a
    /// [`Placement`], what it gets for good; in a [`Version`], what it gets now.
    pub weight: u32,
    /// Whether it may get new connections: it passes its checks and is neither drained nor
    /// in maintenance.
    pub healthy: bool,
}

/// The backends of one version.
#[derive(Clone, Copy, Debug)]
pub struct Version<'a> {
    /// Its slot.
    pub slot: u8,
    /// All that are configured, in any order.
    pub backends: &'a [Backend],
    /// Where its buckets prefer to be; `None` for that of these backends without a past. It
    /// names the same backends; where weights differ from its own, those in `backends` hold
    /// for the time being, as health does.
    pub placement: Option<&'a Arc<Placement>>,
}

/// Where the buckets of a version go that has no healthy backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fallback {
    /// To control's backends.
    #[default]
    Control,
    /// Nowhere.
    None,
}

/// All that a table follows from.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The owner of each bucket.
    pub owners: &'a [u8],
    /// Every version that owns a bucket, and control; in any order.
    pub versions: &'a [Version<'a>],
    /// Slot of the control version.
    pub control: u8,
    /// What becomes of a version without a healthy backend.
    pub fallback: Fallback,
}

/// Where a bucket's new connections go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// The version whose backend it is: the owner, or control.
    pub slot: u8,
    /// Index into that version's [`Version::backends`].
    pub backend: u16,
}

/// A compiled table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output<T = Option<Target>> {
    /// For each bucket its target; `None` gets nothing.
    pub targets: Vec<T>,
    /// No backend of control is healthy, so all of them were taken to be. For an alert.
    pub control_checks_ignored: bool,
    /// Bit *n*: the version in slot *n* owns buckets and has no healthy backend, so
    /// [`Input::fallback`] decided. Set for control when it has no backend to use at all.
    pub fell_back: u16,
}

/// Why an input makes no table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputError {
    /// The owners are none.
    Owners(OwnersError),
    /// A version's slot is none.
    UnknownSlot(u8),
    /// Two versions have one slot.
    DuplicateSlot(u8),
    /// The version that a bucket belongs to, or control, is not given.
    MissingVersion(u8),
    /// A version has too many backends, or one twice.
    Backends {
        /// The version's slot.
        slot: u8,
        /// What is wrong with them.
        error: BackendsError,
    },
    /// A version's placement is for another table, or lacks one of its backends.
    OtherPlacement(u8),
}

impl fmt::Display for InputError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Owners(error) => error.fmt(f),
            Self::UnknownSlot(slot) => write!(f, "slot {slot}: slots end at {}", MAX_VERSIONS - 1),
            Self::DuplicateSlot(slot) => write!(f, "two versions have slot {slot}"),
            Self::MissingVersion(slot) => write!(f, "the version in slot {slot} is missing"),
            Self::Backends { slot, error } => write!(f, "the version in slot {slot}: {error}"),
            Self::OtherPlacement(slot) => {
                write!(
                    f,
                    "the placement of the version in slot {slot} is not one of its backends in this table"
                )
            }
        }
    }
}

impl std::error::Error for InputError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Owners(error) => Some(error),
            Self::Backends { error, .. } => Some(error),
            _ => None,
        }
    }
}

/// Compiles tables of one service, and remembers what makes the next one fast.
///
/// What it returns depends on the input alone: a new `Compiler` gives the same. Memory: two
/// bytes for each bucket and version, and as much again while backends are exchanged; less
/// after [`rest`](Self::rest).
///
/// ```
/// use canary_ebpf_common::compile::{Backend, Compiler, Fallback, Input, Version, identity, initial_owners};
/// let [a, b] = ["10.0.1.1:80", "10.0.1.2:80"]
///     .map(|addr| Backend { identity: identity(&addr.parse().unwrap()), weight: 1, healthy: true });
/// let owners = initial_owners(4096, 0);
/// let input = Input {
///     owners: &owners,
///     versions: &[Version { slot: 0, backends: &[a, b], placement: None }],
///     control: 0,
///     fallback: Fallback::Control,
/// };
/// let table = Compiler::new().compile(&input)?;
/// let of_b = table.targets.iter().flatten().filter(|target| target.backend == 1);
/// assert_eq!(of_b.count(), 2048);
/// # Ok::<(), canary_ebpf_common::compile::InputError>(())
/// ```
#[derive(Default)]
pub struct Compiler {
    placers: Vec<Remembered>,
}

struct Remembered {
    placer: Placer,
    used: bool,
}

/// A version, checked and put in order.
struct Ordered {
    slot: u8,
    placement: Arc<Placement>,
    /// Index of each backend of the placement in the caller's list.
    given: Vec<u16>,
    /// The weight of each that counts now, health included.
    weights: Vec<u32>,
    /// Whether any of those is above 0.
    usable: bool,
    checks_ignored: bool,
}

impl Compiler {
    /// One that remembers nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes less memory until the next compilation, which takes a little longer.
    pub fn rest(&mut self) {
        self.placers.iter_mut().for_each(|remembered| remembered.placer.rest());
    }

    /// The table that follows from `input`.
    ///
    /// Weights hold to one bucket in every version. A version without a healthy backend of
    /// weight above 0 falls back. Its buckets are then placed on control's backends by
    /// themselves, again exact to one bucket, so that neither control's own buckets nor
    /// those of another version that fell back move because of it. If no backend of control
    /// is healthy, all are taken to be.
    ///
    /// # Errors
    ///
    /// Any [`InputError`]: mistakes of the caller, none of which comes from health, weights or shares.
    pub fn compile(&mut self, input: &Input<'_>) -> Result<Output, InputError> {
        self.compile_into(input, None, Some)
    }

    /// The same, with each target as what `name` calls it, and `nothing` where there is none.
    ///
    /// # Errors
    ///
    /// As [`compile`](Self::compile).
    pub fn compile_into<T: Copy>(
        &mut self,
        input: &Input<'_>,
        nothing: T,
        name: impl Fn(Target) -> T,
    ) -> Result<Output<T>, InputError> {
        let &Input { owners, versions, control, fallback } = input;
        let counts = owners::counts(owners).map_err(InputError::Owners)?;
        let mut by_slot: [Option<Ordered>; MAX_VERSIONS] = Default::default();
        for version in versions {
            let slot = by_slot
                .get_mut(usize::from(version.slot))
                .ok_or(InputError::UnknownSlot(version.slot))?;
            if slot.is_some() {
                return Err(InputError::DuplicateSlot(version.slot));
            }
            *slot = Some(Ordered::new(version, version.slot == control, owners.len() as u32)?);
        }
        let of_control = by_slot
            .get(usize::from(control))
            .and_then(Option::as_ref)
            .ok_or(InputError::MissingVersion(control))?;

        for remembered in &mut self.placers {
            remembered.used = false;
        }
        let mut fell_back = 0;
        let mut targets = vec![nothing; owners.len()];
        for (slot, &buckets) in counts.iter().enumerate().filter(|(_, buckets)| **buckets > 0) {
            let own = by_slot[slot].as_ref().ok_or(InputError::MissingVersion(slot as u8))?;
            let version = match (own.usable, fallback) {
                (true, _) => own,
                (false, rule) => {
                    fell_back |= 1 << slot;
                    match rule {
                        Fallback::Control if of_control.usable => of_control,
                        Fallback::Control | Fallback::None => continue,
                    }
                }
            };
            let target = |&backend: &u16| name(Target { slot: version.slot, backend });
            let names: Vec<T> = version.given.iter().map(target).collect();
            let its = Its { owners, slot: slot as u8, buckets };
            self.placer(&version.placement)
                .place(&its, &version.weights, |bucket, index| targets[bucket] = names[index]);
        }
        self.placers.retain(|remembered| remembered.used);
        Ok(Output { targets, control_checks_ignored: of_control.checks_ignored, fell_back })
    }

    /// The placer for a placement, remembered or new.
    fn placer(&mut self, placement: &Arc<Placement>) -> &mut Placer {
        let fits = |p: &Placer| Arc::ptr_eq(p.placement(), placement) || p.placement() == placement;
        let at = self.placers.iter().position(|r| fits(&r.placer)).unwrap_or_else(|| {
            let placer = Placer::new(Arc::clone(placement));
            self.placers.push(Remembered { placer, used: true });
            self.placers.len() - 1
        });
        let remembered = &mut self.placers[at];
        remembered.used = true;
        &mut remembered.placer
    }
}

impl Ordered {
    fn new(version: &Version<'_>, is_control: bool, buckets: u32) -> Result<Self, InputError> {
        let &Version { slot, backends, placement } = version;
        let order =
            placement::order(backends).map_err(|error| InputError::Backends { slot, error })?;
        let of = |i: &u16| backends[usize::from(*i)];
        let placement = match placement {
            Some(placement) => Arc::clone(placement),
            None => Placement::new(backends, buckets)
                .map(Arc::new)
                .map_err(|error| InputError::Backends { slot, error })?,
        };
        let mut given = order;
        given.retain(|i| placement.has(of(i).identity));
        let known = |b: &Backend| b.weight == 0 || placement.has(b.identity);
        if placement.buckets() != buckets
            || given.len() != placement.backends().len()
            || !backends.iter().all(known)
        {
            return Err(InputError::OtherPlacement(slot));
        }
        let weight = |i: &u16, despite_checks: bool| match of(i) {
            Backend { weight, healthy, .. } if despite_checks || healthy => weight,
            _ => 0,
        };
        let mut weights: Vec<u32> = given.iter().map(|i| weight(i, false)).collect();
        let mut usable = weights.iter().any(|&weight| weight > 0);
        let checks_ignored = is_control && !usable && given.iter().any(|i| weight(i, true) > 0);
        if checks_ignored {
            weights = given.iter().map(|i| weight(i, true)).collect();
            usable = true;
        }
        Ok(Self { slot, placement, given, weights, usable, checks_ignored })
    }
}
