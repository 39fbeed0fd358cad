//! `[[rollout]]`: the keys of one rollout, and the service, version and gates that it names.
//!
//! Must not know what a rollout does: only what can be asked of one.

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
    sync::Arc,
    time::Duration,
};

use canary_ebpf_common::share::Share;

use crate::signals;

use super::{
    audience, gate,
    model::{
        Gate, Hooks, KernelSignal, Opening, Protocol, Reaction, Rollout, Route, Secret, Signal,
        SignalKind, Step,
    },
    outside::Outside,
    route,
    scalar::{self, Problem, nearest, quote},
    service,
    sink::Sink,
    source::{At, Span},
    walk::{List, Node},
};

const MAX_NAME_BYTES: usize = 63;
const MAX_STEPS: usize = 100;
const MAX_WINDOWS: usize = 32;
const DEFAULT_HOOK_TIMEOUT: Duration = Duration::from_secs(5);
const MIN_HOOK_TIMEOUT: Duration = Duration::from_millis(100);
const MAX_HOOK_TIMEOUT: Duration = Duration::from_secs(60);
/// Shorter ones can be guessed.
const MIN_SECRET_BYTES: usize = 16;

/// A rollout before the names in it are looked up.
#[derive(Debug)]
pub(super) struct Draft {
    rollout: Rollout,
    name: Option<Span>,
    span: Span,
    service: Option<At<String>>,
    to: Option<At<String>>,
    /// Names of gates by step.
    gates: Vec<Option<At<String>>>,
    /// Names of audiences by step.
    audiences: Vec<Option<At<String>>>,
    splits: Vec<Option<At<Share>>>,
    complete: bool,
}

/// Reads one `[[rollout]]`.
pub(super) fn read(node: &Node<'_>, outside: &dyn Outside, sink: &mut Sink) -> Option<Draft> {
    let mut fields = node.table("rollout", sink)?;
    let span = fields.span;
    let name_node = fields.take("name", sink);
    let name = match name_node {
        Some(node) => node.parse(sink, |text| scalar::name(text, "rollout", MAX_NAME_BYTES)),
        None => {
            sink.absent(span, "this rollout has no `name`");
            None
        }
    };
    let label = match &name {
        Some(name) => format!("rollout `{name}`"),
        None => "this rollout".to_owned(),
    };
    let mut named = |key: &'static str, what: &str, sink: &mut Sink| match fields.take(key, sink) {
        Some(node) => {
            let value = node.string(sink)?.to_owned();
            Some(At { value, span: node.span })
        }
        None => {
            sink.absent(span, format!("{label} has no `{key}`")).help(what.to_owned());
            None
        }
    };
    let service = named("service", "the service whose split it changes", sink);
    let to = named("to", "the version whose share it moves", sink);
    let steps = match fields.take("steps", sink) {
        Some(node) => steps(&node, &label, sink),
        None => {
            sink.absent(span, format!("{label} has no `steps`")).help(
                "such as `steps = [{ split = \"5%\", hold = \"10m\" }, { split = \"100%\" }]`",
            );
            List { items: Vec::new(), complete: false }
        }
    };
    let mut reaction = |key: &'static str, default, sink: &mut Sink| {
        let words = [Reaction::Abort, Reaction::Hold, Reaction::StepBack];
        let words = words.map(|reaction| (reaction.name(), reaction));
        fields.take(key, sink).and_then(|node| node.choice(sink, &words)).unwrap_or(default)
    };
    let on_fail = reaction("on_fail", Reaction::Abort, sink);
    let on_inconclusive = reaction("on_inconclusive", Reaction::Hold, sink);
    let on_no_data = reaction("on_no_data", Reaction::Hold, sink);
    let windows = fields.take("windows", sink).map(|node| {
        let list = node.list(sink, |item, sink| item.parse(sink, Opening::read));
        if list.complete && list.items.is_empty() {
            sink.error(node.span, format!("`windows` of {label} is empty: it could never go on"))
                .help("leave it out to let it go on at any time");
        }
        if list.items.len() > MAX_WINDOWS {
            sink.error(node.span, format!("a rollout has at most {MAX_WINDOWS} windows"));
        }
        list.items.into_iter().map(|item| item.value).collect()
    });
    let hooks = match fields.take("hooks", sink) {
        Some(node) => hooks(&node, outside, sink),
        None => None,
    };
    fields.finish(sink);
    let complete = steps.complete;
    let (mut gates, mut audiences) = (Vec::new(), Vec::new());
    let (mut splits, mut made) = (Vec::new(), Vec::new());
    for Read { step, gate, audience, split } in steps.items {
        made.push(step);
        gates.push(gate);
        audiences.push(audience);
        splits.push(split);
    }
    let text =
        |at: &Option<At<String>>| at.as_ref().map_or_else(String::new, |at| at.value.clone());
    Some(Draft {
        rollout: Rollout {
            service: text(&service),
            to: text(&to),
            steps: made,
            on_fail,
            on_inconclusive,
            on_no_data,
            windows: windows.unwrap_or_default(),
            hooks: hooks.unwrap_or_default(),
            name: name.clone().unwrap_or_default(),
        },
        name: name.is_some().then_some(name_node).flatten().map(|node| node.span),
        span,
        service,
        to,
        gates,
        audiences,
        splits,
        complete,
    })
}

/// A step, and where it names what.
struct Read {
    step: Step,
    gate: Option<At<String>>,
    audience: Option<At<String>>,
    split: Option<At<Share>>,
}

fn steps(node: &Node<'_>, label: &str, sink: &mut Sink) -> List<Read> {
    let mut list = List::default();
    for item in node.items() {
        list.push(step(&item, sink));
    }
    if list.items.len() > MAX_STEPS {
        sink.error(node.span, format!("a rollout has at most {MAX_STEPS} steps"));
        list.complete = false;
    }
    if list.complete && list.items.iter().all(|read| read.step.split.is_none()) {
        sink.error(node.span, format!("no step of {label} sets a `split`: it would do nothing"));
    }
    list
}

fn step(item: &Node<'_>, sink: &mut Sink) -> Option<Read> {
    let mut fields = item.table("rollout.steps", sink)?;
    let span = fields.span;
    let split_node = fields.take("split", sink);
    let split = split_node.and_then(|node| share(&node, sink));
    let hold_node = fields.take("hold", sink);
    let hold = hold_node.and_then(|node| node.parse_loose(sink, scalar::duration));
    let pause_node = fields.take("pause", sink);
    let pause = pause_node.and_then(|node| node.boolean(sink));
    let gate_node = fields.take("gate", sink);
    let gate = gate_node.and_then(|node| {
        let value = node.string(sink)?.to_owned();
        Some(At { value, span: node.span })
    });
    let audience_node = fields.take("audience", sink);
    let audience = audience_node.and_then(|node| {
        let value = node.string(sink)?.to_owned();
        Some(At { value, span: node.span })
    });
    fields.finish(sink);
    let given = [split_node, hold_node, gate_node, pause_node, audience_node];
    if given.iter().all(Option::is_none) {
        sink.error(span, "this step does nothing")
            .help("it has a `split`, a `hold`, a `gate` or `pause = true`");
        return None;
    }
    if let (Some(node), None) = (audience_node, split_node) {
        sink.error(node.span, "this step has an `audience` and no `split`: nothing is set for it")
            .help("say its share, such as `split = \"100%\"`, or leave the audience out");
        return None;
    }
    let bad = split_node.is_some() && split.is_none()
        || hold_node.is_some() && hold.is_none()
        || pause_node.is_some() && pause.is_none()
        || gate_node.is_some() && gate.is_none()
        || audience_node.is_some() && audience.is_none();
    let split = split_node.zip(split).map(|(node, value)| At { value, span: node.span });
    let step = Step {
        audience: audience.as_ref().map(|audience| audience.value.clone()),
        split: split.as_ref().map(|split| split.value),
        hold,
        pause: pause.unwrap_or(false),
        gate: None,
    };
    (!bad).then_some(Read { step, gate, audience, split })
}

fn share(node: &Node<'_>, sink: &mut Sink) -> Option<Share> {
    if node.number().is_some() {
        node.mismatch("a share", sink).help("write it with its unit: \"5%\" or \"64/65536\"");
        return None;
    }
    let share = node.parse(sink, |text| {
        text.parse::<Share>().map_err(|error| Problem::new(error.to_string()))
    })?;
    if share == Share::ZERO {
        sink.error(node.span, "a step can't take all of its share from the version").help(
            "`on_fail` says what becomes of it; `canary-agent rollout abort` does it by hand",
        );
        return None;
    }
    Some(share)
}

fn hooks(node: &Node<'_>, outside: &dyn Outside, sink: &mut Sink) -> Option<Hooks> {
    let mut fields = node.table("rollout.hooks", sink)?;
    let mut call = |key: &'static str, sink: &mut Sink| {
        fields.take(key, sink).and_then(|node| node.parse(sink, gate::web_address))
    };
    let (confirm, event) = (call("confirm", sink), call("event", sink));
    let secret_node = fields.take("secret", sink);
    let file_node = fields.take("secret_file", sink);
    let timeout = fields.take("timeout", sink).and_then(|node| {
        node.parse_loose(sink, |text| {
            let time = scalar::duration(text)?;
            match (MIN_HOOK_TIMEOUT..=MAX_HOOK_TIMEOUT).contains(&time) {
                true => Ok(time),
                false => Err(Problem::new(format!(
                    "`timeout` must be from 100ms to 60s, not {}",
                    quote(text)
                ))),
            }
        })
    });
    fields.finish(sink);
    if let (Some(first), Some(second)) = (secret_node, file_node) {
        sink.error(second.span, "hooks have a `secret` or a `secret_file`, not both")
            .also(first.span, "the secret is here");
    }
    let long_enough = |secret: &[u8]| match secret.len() >= MIN_SECRET_BYTES {
        true => Ok(Secret(secret.to_vec())),
        false => Err(Problem::with(
            format!(
                "a secret has at least {MIN_SECRET_BYTES} bytes, this one has {}",
                secret.len()
            ),
            "make one with `openssl rand -hex 32`",
        )),
    };
    let secret = secret_node
        .and_then(|node| node.parse(sink, |text| long_enough(text.as_bytes())))
        .or_else(|| {
            file_node?.parse(sink, |path| {
                let bytes = outside.file(Path::new(path)).map_err(|error| {
                    Problem::new(format!("{} can't be read: {error}", quote(path)))
                })?;
                long_enough(bytes.trim_ascii())
            })
        });
    Some(Hooks { confirm, event, secret, timeout: timeout.unwrap_or(DEFAULT_HOOK_TIMEOUT) })
}

/// Finds what rollouts name, and says what is not there. Has the connections watched of a service
/// that a rollout goes by; `samples` of them may be at a time.
pub(super) fn resolve(
    drafts: Vec<Draft>,
    services: &mut [service::Placed],
    gates: &[gate::Placed],
    audiences: &[audience::Placed],
    samples: u32,
    sink: &mut Sink,
) -> Vec<Rollout> {
    let mut seen: HashMap<String, Span> = HashMap::new();
    let shared: Vec<Arc<Gate>> = gates.iter().map(|placed| Arc::new(placed.gate.clone())).collect();
    let mut rollouts = Vec::new();
    for draft in drafts {
        let Draft { mut rollout, name, span, service, to, gates, splits, complete, .. } = draft;
        let of_steps = draft.audiences;
        if let Some(span) = name {
            match seen.get(&rollout.name) {
                Some(first) => {
                    sink.error(span, format!("two rollouts are called `{}`", rollout.name))
                        .also(*first, "the first is here");
                }
                None => drop(seen.insert(rollout.name.clone(), span)),
            }
        }
        if let Some(service) = &service {
            version(service, to.as_ref(), services, sink);
        }
        for (step, gate) in rollout.steps.iter_mut().zip(&gates) {
            step.gate = gate.as_ref().and_then(|gate| find_gate(gate, &shared, sink));
        }
        if let Some(service) = &service
            && let Some(placed) = services.iter_mut().find(|one| one.service.name == service.value)
        {
            watch(placed, &rollout, &gates, samples, sink);
            for audience in of_steps.iter().flatten() {
                follow(placed, audience, sink);
            }
        }
        for audience in of_steps.iter().flatten() {
            named(audience, audiences, sink);
        }
        if complete {
            rising(&rollout, &splits, span, sink);
            compared(&rollout, &gates, sink);
        }
        rollouts.push(rollout);
    }
    rollouts
}

fn version(
    service: &At<String>,
    to: Option<&At<String>>,
    services: &[service::Placed],
    sink: &mut Sink,
) {
    let names = || services.iter().map(|placed| placed.service.name.as_str());
    let Some(placed) = services.iter().find(|one| one.service.name == service.value) else {
        let missing = format!("there is no service {}", quote(&service.value));
        let finding = sink.error(service.span, missing);
        if let Some(name) = nearest(&service.value, names()) {
            finding.help(format!("did you mean `{name}`?"));
        }
        return;
    };
    let Some(to) = to else { return };
    let versions = &placed.service.versions;
    match versions.iter().position(|version| version.name == to.value) {
        None => {
            let missing =
                format!("service `{}` has no version {}", service.value, quote(&to.value));
            let finding = sink.error(to.span, missing);
            if let Some(name) = nearest(&to.value, versions.iter().map(|one| one.name.as_str())) {
                finding.help(format!("did you mean `{name}`?"));
            }
        }
        Some(at) if at == placed.service.control => {
            sink.error(
                to.span,
                format!(
                    "`{}` is the control version of service `{}`: it gets what the others leave",
                    to.value, service.value
                ),
            )
            .help("a rollout moves the share of another version");
        }
        Some(_) => {}
    }
}

fn find_gate(name: &At<String>, gates: &[Arc<Gate>], sink: &mut Sink) -> Option<Arc<Gate>> {
    let Some(gate) = gates.iter().find(|gate| gate.name == name.value) else {
        let finding = sink.error(name.span, format!("there is no gate {}", quote(&name.value)));
        if let Some(near) = nearest(&name.value, gates.iter().map(|gate| gate.name.as_str())) {
            finding.help(format!("did you mean `{near}`?"));
        }
        return None;
    };
    Some(Arc::clone(gate))
}

/// Has a service's connections watched for a rollout, or says what of them can't be seen there.
fn watch(
    placed: &mut service::Placed,
    rollout: &Rollout,
    names: &[Option<At<String>>],
    samples: u32,
    sink: &mut Sink,
) {
    // What is slow is fixed once, for the whole service.
    let mut slow: Option<(u16, &str)> = None;
    let mut said: Vec<&str> = Vec::new();
    for (step, name) in rollout.steps.iter().zip(names) {
        let (Some(gate), Some(name)) = (&step.gate, name) else { continue };
        if said.contains(&gate.name.as_str()) {
            continue;
        }
        said.push(&gate.name);
        let counted: Vec<&KernelSignal> = gate.signals.iter().filter_map(counted).collect();
        let Some(first) = counted.first() else { continue };
        let service = &mut placed.service;
        let goes_by = |kind: SignalKind| format!("gate `{}` goes by `{}`", gate.name, kind.name());
        let mut refuse = |kind: SignalKind, why: String, help: &str| {
            sink.error(name.span, format!("{}, {why}", goes_by(kind))).help(help.to_owned());
        };
        if !service.ports.is_empty()
            && !service.ports.iter().any(|port| port.protocol == Protocol::Tcp)
        {
            let why = format!("and service `{}` has no TCP port", service.name);
            refuse(
                first.kind,
                why,
                "datagrams say nothing of how their connections fare: ask a `prometheus`, a `command` or a `webhook`",
            );
        } else if samples == 0 {
            let why = "and `agent.capacity.samples` is 0: no connection is watched".to_owned();
            refuse(
                first.kind,
                why,
                "leave it out, or set it to the number of connections that may be watched at a time",
            );
        } else if let Some(span) = placed.unwatched {
            sink.error(
                name.span,
                format!(
                    "{}, and `signals` of service `{}` is false",
                    goes_by(first.kind),
                    service.name
                ),
            )
            .also(span, "that is here")
            .help("leave it out: a rollout has the connections watched that it goes by");
        } else {
            service.signals = true;
        }
        for signal in counted {
            if let Some(why) = signals::unseen(signal.kind, service.forward) {
                let why = format!("which can't be seen of service `{}`: {why}", service.name);
                sink.error(name.span, format!("{}, {why}", goes_by(signal.kind)))
                    .help("take it out of the gate, or write another gate for this rollout");
            }
            let Some(permille) = signal.quantile_permille else { continue };
            match slow {
                Some((other, earlier)) if other != permille => {
                    sink.error(
                        name.span,
                        format!(
                            "gates `{earlier}` and `{}` of rollout `{}` have different `over`",
                            gate.name, rollout.name
                        ),
                    )
                    .help(
                        "what is slow is fixed once, when the rollout begins: give both the same",
                    );
                }
                _ => slow = Some((permille, &gate.name)),
            }
        }
    }
}

fn counted(signal: &Signal) -> Option<&KernelSignal> {
    match signal {
        Signal::Kernel(signal) => Some(signal),
        Signal::Probe(_) => None,
    }
}

/// Warns of a gate that has nothing to compare with, because control gets nothing.
fn compared(rollout: &Rollout, names: &[Option<At<String>>], sink: &mut Sink) {
    for (at, (step, name)) in rollout.steps.iter().zip(names).enumerate() {
        let (Some(gate), Some(name)) = (&step.gate, name) else { continue };
        let share = rollout.for_everyone(at).unwrap_or(Share::ZERO);
        if share == Share::ALL && gate.signals.iter().any(Signal::decides_by_counts) {
            sink.warning(
                name.span,
                format!(
                    "gate `{}` compares with control, which gets nothing at {share}: it can't decide",
                    gate.name
                ),
            )
            .help("put it at the step before, or `hold` here instead");
        }
    }
}

/// Whether the audience that a step names is there, with anybody in it.
fn named(name: &At<String>, audiences: &[audience::Placed], sink: &mut Sink) {
    let known = audiences.iter().find(|one| one.audience.name == name.value);
    let Some(audience::Placed { audience, .. }) = known else {
        let missing = format!("there is no audience {}", quote(&name.value));
        let finding = sink.absent(name.span, missing);
        let names = audiences.iter().map(|one| one.audience.name.as_str());
        match nearest(&name.value, names) {
            Some(near) => finding.help(format!("did you mean `{near}`?")),
            None => finding
                .help(format!("describe it: `[[audience]]`, `name = {}`", quote_text(&name.value))),
        };
        return;
    };
    if audience.networks.is_empty() && audience.dynamic.is_none() {
        sink.warning(name.span, format!("nobody is in `{}`: this step reaches no one", name.value));
    }
}

fn quote_text(text: &str) -> String {
    format!("\"{text}\"")
}

/// Gives an audience a table of its own in the service, from the time the configuration is read: a
/// step changes shares of it, and no client changes tables then.
fn follow(placed: &mut service::Placed, name: &At<String>, sink: &mut Sink) {
    let its = |route: &&route::Placed| route.route.audience == name.value;
    if let Some(route) = placed.routes.items.iter().find(its) {
        if !route.route.follows {
            sink.error(
                name.span,
                format!(
                    "service `{}` has a route for `{}`, which says already what its clients get",
                    placed.service.name, name.value
                ),
            )
            .also(route.audience, "that is here, and holds whatever a rollout does")
            .help("take the route out to let the rollout move their share, or leave this step out");
        }
        return;
    }
    let split = placed.service.split.clone();
    let route = Route { audience: name.value.clone(), split, follows: true };
    placed.service.routes.push(route.clone());
    placed.routes.items.push(route::Placed { route, audience: name.span });
    if placed.routes.items.len() == route::MAX_ROUTES + 1 {
        sink.error(
            name.span,
            format!(
                "service `{}` has {} routes with those that steps of rollouts need; {} is the most",
                placed.service.name,
                placed.routes.items.len(),
                route::MAX_ROUTES
            ),
        )
        .help("each has a forwarding table of its own: let one audience have several sources");
    }
}

/// Warns of a share that is no larger than the one before; refuses those of audiences that are
/// none, since everyone has them already, or would be taken back in the end.
fn rising(rollout: &Rollout, splits: &[Option<At<Share>>], span: Span, sink: &mut Sink) {
    let steps = || rollout.steps.iter().zip(splits);
    let given = |audience: Option<&str>| -> Vec<&At<Share>> {
        let its = steps().filter(|(step, _)| step.audience.as_deref() == audience);
        its.filter_map(|(_, split)| split.as_ref()).collect()
    };
    let audiences: BTreeSet<&str> =
        rollout.steps.iter().filter_map(|step| step.audience.as_deref()).collect();
    for audience in audiences.iter().map(|name| Some(*name)).chain([None]) {
        for pair in given(audience).windows(2) {
            if let [first, second] = pair
                && second.value <= first.value
            {
                sink.warning(
                    second.span,
                    format!("this share ({}) is not larger than the one before", second.value),
                )
                .also(first.span, "that one is here");
            }
        }
    }
    let mut everyone: Option<&At<Share>> = None;
    for (step, split) in steps() {
        let Some(split) = split else { continue };
        match (&step.audience, everyone) {
            (None, _) => everyone = Some(split),
            (Some(audience), Some(before)) if before.value >= split.value => {
                sink.error(
                    split.span,
                    format!(
                        "everyone has {} by then, and `{audience}` with them: this step would give it no more",
                        before.value
                    ),
                )
                .also(before.span, "since this step")
                .help("put the step of an audience before those for everyone, or give it a larger share");
            }
            (Some(_), _) => {}
        }
    }
    let last = everyone.map_or(Share::ZERO, |last| last.value);
    for audience in audiences {
        let Some(most) = given(Some(audience)).into_iter().max_by_key(|share| share.value) else {
            continue;
        };
        if most.value > last {
            sink.error(
                most.span,
                format!(
                    "the rollout ends with {last} for everyone, and `{audience}` has more: when it is over, \
                     nothing would say so any more"
                ),
            )
            .help(
                "end with a step for everyone that gives them as much; for a share that is to stay, write a \
                 `[[service.route]]`",
            );
        }
    }
    if everyone.is_some_and(|last| last.value.fraction() < 1.0) {
        sink.warning(span, "the last share is less than 100%: the rollout is done with it, and control keeps the rest");
    }
}
