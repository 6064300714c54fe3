// What the forms of an endpoint ask of the server, by values: replicas, shares of the requests, limits of a key.
import type { Endpoint, ServedRevision } from '../../api/types';

/** What a form of replicas is sent as: a number, or bounds; an error in words. */
export function replicasOf(fewest: string, most: string, follows: boolean): string {
  const low = wholeNumber(fewest, follows ? 'fewest replicas' : 'replicas', follows ? 0 : 1);
  if (!follows) {
    return String(low);
  }
  const high = wholeNumber(most, 'most replicas', 1);
  if (high < low) {
    throw new Error(`At most ${high} replicas are fewer than at least ${low}.`);
  }
  return `${low}:${high}`;
}

/** The canary's share as the shares of both, in percent. */
export function sharesOf(canary: number): Record<string, number> {
  if (!Number.isInteger(canary) || canary < 0 || canary > 100) {
    throw new Error(`${canary} percent: between 0 and 100 go to the canary.`);
  }
  return { stable: 100 - canary, canary };
}

export const LIMITS = ['requests_per_minute', 'tokens_per_minute', 'parallel_requests'] as const;
export type Limit = (typeof LIMITS)[number];

/** The limits that were filled in. */
export function limitsOf(texts: Partial<Record<Limit, string>>): Partial<Record<Limit, number>> {
  const filled = LIMITS.filter(name => (texts[name] ?? '').trim() !== '');
  return Object.fromEntries(filled.map(name => [name, wholeNumber(texts[name] ?? '', name.replaceAll('_', ' '), 1)]));
}

function wholeNumber(text: string, what: string, least: number): number {
  const value = Number(text.trim());
  if (text.trim() === '' || !Number.isInteger(value) || value < least) {
    throw new Error(`${what}: "${text}" is no whole number from ${least} on.`);
  }
  return value;
}

/** The revision with a role, the newest one. */
export function withRole(endpoint: Endpoint, role: string): ServedRevision | undefined {
  return [...(endpoint.revisions ?? [])].reverse().find(revision => revision.role === role);
}

/** What the server would go back to: without the canary, or to the revision before; "" when to nothing. */
export function rollbackTo(endpoint: Endpoint): string {
  const stable = withRole(endpoint, 'stable');
  if (withRole(endpoint, 'canary')) {
    return stable ? stable.target : '';
  }
  const earlier = (endpoint.revisions ?? []).filter(
    revision =>
      ['retired', 'previous'].includes(revision.role) &&
      !revision.note &&
      revision.was_stable !== false && // a canary or a shadow was only tried
      (!stable || revision.number < stable.number)
  );
  return earlier.at(-1)?.target ?? '';
}

/** How a shadow compares, in a line: as `%endpoints show` says it. */
export function comparisonText(revision: ServedRevision): string {
  const found = revision.comparison;
  const dropped = found?.num_dropped ? `${found.num_dropped} not copied` : '';
  if (!found || !found.num_compared) {
    return ['nothing compared yet', dropped].filter(Boolean).join(', ');
  }
  const percent = (share: number | null | undefined) => `${Math.round(100 * (share ?? 0))}%`;
  return [
    typeof found.equal_share === 'number' ? `${percent(found.equal_share)} of ${found.num_comparable} greedy answers equal` : '',
    typeof found.latency_ratio === 'number' ? `${found.latency_ratio.toFixed(2)} x the time` : '',
    `${percent(found.error_share)} errors (${percent(found.stable_error_share)} without it)`,
    dropped
  ]
    .filter(Boolean)
    .join(', ');
}
