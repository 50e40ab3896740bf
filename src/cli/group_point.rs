//! Points of groups, for `tidegate point`.

use super::{Ask, ask, output};
use crate::control::api::{PointView, Request};
use crate::control::groups::{GroupPointView, ResolvedPoint};

/// What a text names, so that what follows acts on the machine's point or on the group's parts.
pub(super) fn resolve(point: &str, machine: Option<&str>, args: &Ask) -> anyhow::Result<ResolvedPoint> {
    ask(&args.control, &Request::ResolvePoint { point: point.to_owned(), machine: machine.map(str::to_owned) })
}

/// The machine's point that is meant: with a machine given, a group's point stands for its part.
pub(super) fn of_machine(point: String, machine: Option<&str>, args: &Ask) -> anyhow::Result<String> {
    let Some(machine) = machine else { return Ok(point) };
    Ok(resolve(&point, Some(machine), args)?.point.unwrap_or(point))
}

/// The group column of a machine's point: empty when it is not a part of a whole group point.
pub(super) fn column(point: &PointView) -> String {
    match (&point.group, point.group_members) {
        (Some(group), Some((members, machines))) if members < machines => format!("{group} {members}/{machines}"),
        (Some(group), _) => group.clone(),
        (None, _) => String::new(),
    }
}

fn members(point: &GroupPointView) -> String {
    let missing = if point.missing.is_empty() { String::new() } else { format!(", missing: {}", point.missing.join(", ")) };
    format!("{} of {}{missing}", point.parts.len(), point.machines)
}

/// `point list --group`.
pub(super) fn list(group: String, last: Option<usize>, args: &Ask) -> anyhow::Result<()> {
    let points: Vec<GroupPointView> = output::newest(ask(&args.control, &Request::GroupPoints { group: Some(group) })?, last);
    if args.json {
        return output::json(&points);
    }
    let row = |p: &GroupPointView| {
        vec![
            p.id.clone(),
            p.time.clone(),
            p.kind.clone(),
            members(p),
            format!("{:.1} ms", p.hold_seconds * 1e3),
            if p.pinned { "pinned".to_owned() } else { String::new() },
            p.label.clone().unwrap_or_default(),
            p.remark.clone().unwrap_or_default(),
        ]
    };
    output::table(&["POINT", "TIME", "KIND", "MEMBERS", "HELD", "PINNED", "LABEL", "REMARK"], &points.iter().map(row).collect::<Vec<_>>());
    Ok(())
}

/// `point show` of a group's point.
pub(super) fn show(point: &GroupPointView, args: &Ask) -> anyhow::Result<()> {
    if args.json {
        return output::json(point);
    }
    println!("point    {}", point.id);
    println!("group    {}", point.group);
    println!("members  {}", members(point));
    println!("time     {} (the earliest of the sources' clocks)", point.time);
    println!("kind     {}", point.kind);
    println!("held     {:.1} ms", point.hold_seconds * 1e3);
    println!("label    {}", point.label.as_deref().unwrap_or("-"));
    println!("pinned   {}", if point.pinned { "yes" } else { "no" });
    if let Some(remark) = &point.remark {
        println!("remark   {remark}");
    }
    for part in &point.parts {
        println!(
            "  part of {}: {} ({}, held {:.1} ms, {}verified {})",
            part.machine,
            part.point,
            part.kind,
            part.hold_seconds * 1e3,
            if part.pinned { "pinned, " } else { "" },
            output::ago(part.verified_age_seconds)
        );
    }
    Ok(())
}

/// `point pin` and `point unpin` of a group's point.
pub(super) fn pin(point: &GroupPointView, pinned: bool, args: &Ask) -> anyhow::Result<()> {
    let view: GroupPointView = ask(&args.control, &Request::PinGroupPoint { point: point.id.clone(), pinned })?;
    if args.json {
        return output::json(&view);
    }
    let what = if pinned { "pinned: its parts stay until they are unpinned" } else { "left to the policy" };
    println!("point {} of group {} is {what} ({} parts)", view.id, view.group, view.parts.len());
    Ok(())
}
