// What is typed into the form of a cluster, as the values that its class takes. Values in, values out.
import type { ClusterOption } from '../../api/types';

export type Value = string | number | boolean | null | unknown[] | Record<string, unknown>;

/** The value of an option by its text; undefined where nothing was typed. Throws an Error that says what is expected. */
export function parseOption(option: Pick<ClusterOption, 'name' | 'type'>, text: string): Value | undefined {
  const given = text.trim();
  if (given === '') {
    return undefined;
  }
  switch (option.type) {
    case 'integer':
    case 'number':
      return parseNumber(option, given);
    case 'boolean':
      return given === 'true';
    case 'list':
      return given.startsWith('[') ? parseJson(option, given, 'a list') : given.split(',').map(part => part.trim());
    case 'object':
      return parseJson(option, given, 'an object such as {"key": 1}');
    default:
      return given;
  }
}

/** The options that differ from their defaults. */
export function changedOptions(options: readonly ClusterOption[], texts: Readonly<Record<string, string>>): Record<string, Value> {
  const found: Record<string, Value> = {};
  for (const option of options) {
    const text = texts[option.name];
    const value = text === undefined ? undefined : parseOption(option, text);
    if (value !== undefined && value !== option.default) {
      found[option.name] = value;
    }
  }
  return found;
}

function parseNumber(option: Pick<ClusterOption, 'name' | 'type'>, text: string): number {
  const value = Number(text);
  if (!Number.isFinite(value) || (option.type === 'integer' && !Number.isInteger(value))) {
    throw new Error(`${option.name}: "${text}" is no ${option.type === 'integer' ? 'whole number' : 'number'}.`);
  }
  return value;
}

function parseJson(option: Pick<ClusterOption, 'name'>, text: string, expected: string): Value {
  try {
    return JSON.parse(text) as Value;
  } catch {
    throw new Error(`${option.name}: expected ${expected}, as JSON.`);
  }
}
